"""A kernel whose cache on disk cannot be used is compiled in memory."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from numba.core.caching import FunctionCache

KERNEL = """
from pipeline.numba_cache import CachedKernel

def _double(value):
    if value < 0:
        raise ValueError("negative")
    return 2 * value

double = CachedKernel(_double, {"nogil": True})
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with a kernel, and an empty cache folder of its own."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "kernel_module.py"
    path.write_text(KERNEL)
    return path


def load(source: Path) -> ModuleType:
    """The module as a new process would import it."""
    spec = importlib.util.spec_from_file_location("kernel_module", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop("kernel_module", None)
    spec.loader.exec_module(module)
    return module


def cache_files(source: Path, suffix: str) -> list[Path]:
    return sorted((source.parent / "cache").rglob(f"*{suffix}"))


def test_compiled_code_is_kept_on_disk(source: Path) -> None:
    assert load(source).double(21) == 42
    assert len(cache_files(source, ".nbi")) == 1
    assert len(cache_files(source, ".nbc")) == 1
    before = cache_files(source, ".nbc")[0].stat().st_mtime_ns

    assert load(source).double(21) == 42
    assert cache_files(source, ".nbc")[0].stat().st_mtime_ns == before  # read, not written again


def test_damaged_cache_warns_once_and_compiles_in_memory(source: Path) -> None:
    assert load(source).double(21) == 42
    for path in cache_files(source, ".nbc"):
        path.write_bytes(b"")

    module = load(source)
    with pytest.warns(UserWarning, match="cache cannot be used.*Ran out of input"):
        assert module.double(21) == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.double(4) == 8


def test_full_disk_warns_and_compiles_in_memory(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FunctionCache, "save_overload", no_space)
    module = load(source)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert module.double(21) == 42
    assert module.double(4) == 8


def test_without_a_writable_folder_the_kernel_compiles_in_memory(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_writable(*arguments: object, **options: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", not_writable)  # how Numba looks for a folder
    module = load(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.double(21) == 42
    assert cache_files(source, ".nbi") == []


def test_errors_of_the_function_itself_are_raised(source: Path) -> None:
    module = load(source)
    with pytest.warns(UserWarning, match="negative"), pytest.raises(ValueError, match="negative"):
        module.double(-1)
    with pytest.raises(ValueError, match="negative"):
        module.double(-1)
