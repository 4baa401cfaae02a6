"""The project as others get it: resolved without OpenCV, installed with pip, used from the README's ten lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.images import write_photos

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv")
    if found is None:
        if os.environ.get("TWINFEED_CI"):
            pytest.fail("uv is not on the PATH")
        pytest.skip("needs uv on the PATH, and a network")
    return found


def clone(target: Path) -> Path:
    """The tracked files, as a fresh clone has them."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def outside_any_environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | more


def test_runs_where_the_libraries_that_ffcv_is_built_from_are_missing(
    tmp_path: Path, uv: str
) -> None:
    env = outside_any_environment(PKG_CONFIG_LIBDIR="/nonexistent")
    code = "import presets; print(presets.parse([])[0])"
    result = subprocess.run(
        [uv, "run", "--python", sys.executable, "python", "-c", code],
        cwd=clone(tmp_path),
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "demo", result.stderr
    assert 'name = "ffcv"' in (tmp_path / "uv.lock").read_text(), "the extra was resolved too"


def test_pip_install_feeds_somebody_elses_loop(tmp_path: Path, uv: str) -> None:
    """The lines of the README, on a folder of images, in an environment that has nothing else."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "twinfeed.pipeline" in block)
    assert len(lines.splitlines()) <= 12
    environment, work = tmp_path / "environment", tmp_path / "work"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    constraints = tmp_path / "constraints.txt"
    export = [
        uv,
        "export",
        "-q",
        "--no-hashes",
        "--no-dev",
        "--no-emit-project",
        "--python",
        sys.executable,
    ]
    with constraints.open("w") as file:
        source = clone(tmp_path / "clone")
        subprocess.run(export, cwd=source, stdout=file, check=True, env=outside_any_environment())
    install = [uv, "pip", "install", "-q", "--python", python, "-c", constraints, source]
    subprocess.run(install, check=True, env=outside_any_environment())
    write_photos(work / "photos", 256)
    (work / "loop.py").write_text(lines)
    ran = subprocess.run(
        [python, "loop.py"], cwd=work, env=outside_any_environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
