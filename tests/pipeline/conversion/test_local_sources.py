"""Sources on this machine: folders of images, and record files."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from pipeline.images import BadImage
from tests.helpers.images import write_photos
from tests.helpers.sources import JPEGS, contents_of, fail, open_quietly


def test_folder_is_listed_without_opening_a_file(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "dog/a.jpg": JPEGS[0],
        "cat/deep/b.PNG": b"not looked into",
        "cat/.c.jpg": b"",
        "d.txt": b"",
    }
    folder = tmp_path / "data"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fail)
        source = pickle.loads(pickle.dumps(open_quietly(folder, scratch)))
    assert contents_of(source) == [
        ("cat/deep/b.PNG", b"not looked into", "cat"),
        ("dog/a.jpg", JPEGS[0], "dog"),
    ]
    (folder / "dog" / "a.jpg").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)
    shutil.rmtree(folder)
    with pytest.raises(OSError, match=r"the images in .*data cannot be read: No such file"):
        source.read(0)


def test_identity_of_a_folder_depends_on_names_and_classes_but_not_on_its_place(
    tmp_path: Path, scratch: Path
) -> None:
    one = open_quietly(write_photos(tmp_path / "one", 6), scratch)
    other = open_quietly(write_photos(tmp_path / "other", 6), scratch)
    assert one.identity == other.identity
    (tmp_path / "other" / "class0" / "0000.jpg").rename(tmp_path / "other" / "class1" / "0000.jpg")
    assert open_quietly(tmp_path / "other", scratch).identity != one.identity


def test_training_and_test_images_are_not_mixed(tmp_path: Path, scratch: Path) -> None:
    write_photos(tmp_path / "data" / "train", 6)
    assert open_quietly(tmp_path / "data", scratch).classes == ["class0", "class1", "class2"]
    write_photos(tmp_path / "data" / "val", 3)
    message = r"data holds train/ and val/: convert each separately"
    with pytest.raises(ValueError, match=message):
        open_quietly(tmp_path / "data", scratch)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", "holds no image"),
        ("notes.txt", "is not image data"),
        ("{0,1}", "does not exist"),
        ("gone", "does not exist"),
    ],
)
def test_paths_without_images_are_refused(
    tmp_path: Path, scratch: Path, name: str, reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    message = rf"{re.escape(name)} {reason}.*\.jpg.*\.parquet.*beton"
    with pytest.raises(ValueError, match=message):
        open_quietly(tmp_path / name, scratch)


@pytest.mark.usefixtures("jpeg_lines")
def test_record_files_are_read_through_their_store(tmp_path: Path, scratch: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(JPEGS[2 * i] + JPEGS[2 * i + 1])
    source = pickle.loads(pickle.dumps(open_quietly(tmp_path, scratch)))
    contents = contents_of(source)
    assert [image for _, image, _ in contents] == JPEGS[:4]
    assert [label for *_, label in contents] == ["0", "0", "1", "1"]
    assert [name for name, *_ in contents] == [
        f"{tmp_path.name}/{i}.tar, byte {at}" for i in (0, 1) for at in (0, len(JPEGS[2 * i]))
    ]
    os.truncate(tmp_path / "1.tar", 3)
    with pytest.raises(BadImage, match="it cannot be read"):
        source.read(2)
    assert open_quietly(tmp_path / "0.tar", scratch).identity != source.identity
