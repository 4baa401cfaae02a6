"""Drawn photographs: their size, their cost, and when they are drawn again."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.photos import draw_photos


def test_photos_have_the_size_of_imagenets(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    folder = draw_photos(
        tmp_path / "photos", 32, progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(done, 32) for done in range(1, 33)]
    contents = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    assert {Image.open(io.BytesIO(data)).size for data in contents} == {(500, 375)}
    assert np.mean([len(data) for data in contents]) == pytest.approx(97_000, abs=5_000)
    assert len(set(contents)) == 32


def small_photos(folder: Path, count: int, **settings: int) -> list[bytes]:
    """Draw small photos; return the contents of all JPEGs in the folder."""
    draw_photos(folder, count, width=90, height=60, **settings)
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def test_photos_are_drawn_once(tmp_path: Path) -> None:
    small_photos(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    small_photos(tmp_path, 4)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_photos_depend_on_the_seed_only_and_other_settings_replace_them(tmp_path: Path) -> None:
    first = small_photos(tmp_path, 4)
    assert small_photos(tmp_path, 3, seed=1) != first[:3]
    assert small_photos(tmp_path, 2) == first[:2]
    assert small_photos(tmp_path, 4) == first


def test_other_files_in_the_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    assert small_photos(tmp_path, 3)[-1] == b"mine"
    assert small_photos(tmp_path, 2)[-1] == b"mine"


def test_an_interrupted_drawing_is_repeated(tmp_path: Path) -> None:
    first = small_photos(tmp_path, 4)
    (tmp_path / "drawn.json").unlink()
    (tmp_path / "drawn-00001.jpg").write_bytes(b"half")
    assert small_photos(tmp_path, 4) == first
