"""Files that are complete or absent, and JSON without NaN."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from experiment import write_json
from experiment.atomic_write import write_text


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [math.nan, 1.5, (math.inf, "x")], "b": {"c": -math.inf}, "d": None})
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values == {"a": [None, 1.5, [None, "x"]], "b": {"c": None}, "d": None}


def test_other_objects_are_written_as_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"folder": Path("photos")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"folder": "photos"}


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old", "who reads the old file can finish"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_bytes() == b"old"


def test_names_that_are_not_unicode_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", os.fsdecode(b"\xff.jpg"))
    assert (tmp_path / "x.txt").read_text() == r"\udcff.jpg"
