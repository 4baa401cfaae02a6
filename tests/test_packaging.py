"""The project as others get it: a fresh clone resolved by uv, and installed with pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.images import write_photos

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "experiment", "evaluation")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uv() -> str:
    """The path of uv. These tests also need a network."""
    path = shutil.which("uv")
    if path is None:
        if os.environ.get("TWINFEED_CI"):
            pytest.fail("uv is not on the PATH")
        pytest.skip("needs uv on the PATH, and a network")
    return path


def clone(target: Path) -> Path:
    """Copy the tracked files, as a fresh clone has them."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def clean_environment(**more: str) -> dict[str, str]:
    """The environment variables of this process, without those of its virtual environment."""
    names = os.environ.keys() - {"VIRTUAL_ENV", "PYTHONPATH"}
    return {name: os.environ[name] for name in names} | more


def test_a_clone_runs_without_the_libraries_that_ffcv_is_compiled_with(
    tmp_path: Path, uv: str
) -> None:
    code = "from experiment import presets; print(presets.parse([])[0])"
    result = subprocess.run(
        [uv, "run", "--python", sys.executable, "python", "-c", code],
        cwd=clone(tmp_path),
        env=clean_environment(PKG_CONFIG_LIBDIR="/nonexistent"),
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "demo", result.stderr
    assert 'name = "ffcv"' in (tmp_path / "uv.lock").read_text(), "the extra is resolved too"


class Installation(NamedTuple):
    """An environment in which only `pip install .` has installed anything."""

    python: Path
    photos: Path  # 256 labelled images

    def run(self, code: str, folder: Path) -> str:
        """Run Python code in a folder, and return what it prints."""
        result = subprocess.run(
            [self.python, "-c", code],
            cwd=folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def installation(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """`pip install .` with the pinned versions."""
    folder = tmp_path_factory.mktemp("installation")
    source = clone(folder / "clone")
    constraints = folder / "constraints.txt"
    export = [uv, "export", "-q", "--no-hashes", "--no-dev", "--no-emit-project"]
    with constraints.open("w") as file:
        subprocess.run(
            [*export, "--python", sys.executable],
            cwd=source,
            stdout=file,
            check=True,
            env=clean_environment(),
        )

    environment = folder / "environment"
    python = environment / "bin" / "python"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
    install = [uv, "pip", "install", "-q", "--python", str(python), "-c", str(constraints)]
    subprocess.run([*install, str(source)], check=True, env=clean_environment())
    return Installation(python, write_photos(folder / "photos", 256))


def test_the_training_loop_of_the_readme_runs_in_an_installed_environment(
    installation: Installation,
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (loop,) = (block for block in blocks if "twinfeed.pipeline" in block)
    assert len(loop.splitlines()) <= 12
    installation.run(loop, installation.photos.parent)


CLASSIFY = """
from pathlib import Path
from twinfeed.evaluation import load_classifier
from twinfeed.model import build_backbone, export_backbone

checkpoint = export_backbone(build_backbone("resnet18", 8), Path(), size=32)
classifier = load_classifier(checkpoint, train="photos")
image = Path("photos/class1/0001.jpg")
print(*classifier.classes, classifier.predict(image)["pred_class"])
"""


def test_a_classifier_can_be_loaded_in_an_installed_environment(
    installation: Installation,
) -> None:
    """The weights that the installed model exports, and a kNN vote of labelled photos."""
    *classes, predicted = installation.run(CLASSIFY, installation.photos.parent).split()
    assert classes == ["class0", "class1", "class2"]
    assert predicted in classes


def test_type_checkers_find_the_types_of_the_installed_packages(
    installation: Installation,
) -> None:
    code = "import twinfeed.pipeline as p; print(p.__file__)"
    printed = installation.run(code, installation.photos.parent)
    twinfeed = Path(printed.strip()).parents[1]
    assert {path.name for path in twinfeed.iterdir() if path.is_dir()} >= set(PACKAGES)
    for package in PACKAGES:
        assert (twinfeed / package / "py.typed").exists()
