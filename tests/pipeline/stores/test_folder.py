"""Folders of images: classes, splits, bad files, and the cache of the index."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import FolderStore, cache_folder, find_splits, open_store
from tests.helpers.images import encoded, picture, write_photos


def write_image(path: Path, width: int = 20, height: int = 16, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    format = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    path.write_bytes(encoded(picture(width, height, seed), format))
    return path


def relative_names(store: Any, root: Path) -> list[str]:
    return [os.path.relpath(store.name(i), root) for i in range(len(store))]


def sizes_of(store: Any) -> list[tuple[int, int]]:
    """Width and height of each image, by the index."""
    return list(zip(store.index["width"].tolist(), store.index["height"].tolist(), strict=True))


# Images and classes


def test_sub_folders_are_classes_and_images_lie_at_any_depth_below(tmp_path: Path) -> None:
    for name in ("dog/a.jpg", "dog/deep/deeper/b.PNG", "cat/c.JPEG", "ant/d.webp", "dog/e.Jpg"):
        write_image(tmp_path / name)
    store = open_store(tmp_path)
    assert store.classes == ["ant", "cat", "dog"]
    names = relative_names(store, tmp_path)
    assert names == ["ant/d.webp", "cat/c.JPEG", "dog/a.jpg", "dog/deep/deeper/b.PNG", "dog/e.Jpg"]
    classes = [store.classes[label] for label in store.index["label"]]
    assert classes == ["ant", "cat", "dog", "dog", "dog"]
    assert store.rejects == {}


@pytest.mark.parametrize(
    "files",
    [["a.jpg", "b.jpg"], ["a.jpg", "dog/b.jpg", "cat/c.jpg"], ["dog/a.jpg", "dog/b/c.jpg"]],
    ids=str,
)
def test_images_beside_folders_or_in_a_single_folder_have_no_labels(
    tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        write_image(tmp_path / name)
    store = open_store(tmp_path)
    assert store.classes == []
    assert store.index["label"].tolist() == [-1] * len(files)


def test_sizes_and_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    sizes = [(20, 33), (41, 7), (5, 5)]
    paths = [write_image(tmp_path / f"{i}.jpg", *size, seed=i) for i, size in enumerate(sizes)]
    store = open_store(str(tmp_path))
    assert sizes_of(store) == sizes
    assert store.read_batch(np.array([2, 0, 2])) == [paths[i].read_bytes() for i in (2, 0, 2)]


def test_sizes_are_found_in_misnamed_files_and_behind_long_profiles(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(31, 17), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(23, 11), icc_profile=bytes(100_000)))
    (tmp_path / "c.png").write_bytes(encoded(picture(40, 50)))
    assert sizes_of(open_store(tmp_path)) == [(31, 17), (23, 11), (40, 50)]


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "good.jpg")
    write_image(tmp_path / "b" / "good.jpg")
    for name in (".hidden.jpg", ".git/c.jpg", "a/.thumbs/d.jpg", "a/._good.jpg"):
        write_image(tmp_path / name)
    for name in ("readme.txt", "a/list.csv", "b/jpg", "b/x.jpg.part"):
        (tmp_path / name).write_text("not an image")
    (tmp_path / "b" / "folder.jpg").mkdir()
    store = open_store(tmp_path)
    assert relative_names(store, tmp_path) == ["a/good.jpg", "b/good.jpg"]
    assert store.rejects == {}
    assert store.classes == ["a", "b"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    data = tmp_path / "data"
    elsewhere = tmp_path / "elsewhere"
    write_image(data / "dog" / "a.jpg")
    write_image(elsewhere / "b.jpg")
    (data / "dog" / "loop").symlink_to(data, target_is_directory=True)
    (data / "dog" / "self").symlink_to(data / "dog", target_is_directory=True)
    (data / "wolf").symlink_to(elsewhere, target_is_directory=True)
    (data / "dog" / "file.jpg").symlink_to(elsewhere / "b.jpg")
    (data / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    store = open_store(data)
    assert relative_names(store, data) == ["dog/a.jpg", "dog/file.jpg", "wolf/b.jpg"]
    assert list(store.rejects) == ["dog/gone.jpg"]
    assert "No such file" in store.rejects["dog/gone.jpg"]


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    good = [b"\xff\xfe.jpg", b"two\nlines.jpg", "größer 猫.jpg".encode(), b"-rf *.jpg"]
    bad = b"bad\xff\n.jpg"
    for name in good:
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(picture(20, 16)))
    (tmp_path / os.fsdecode(bad)).write_bytes(b"not an image")
    for _ in range(2):  # the second time from the cache
        store = pickle.loads(pickle.dumps(open_store(tmp_path)))
        assert all(store.read_batch(np.arange(4)))
        names = [os.fsencode(os.path.basename(store.name(i))) for i in range(len(store))]
        assert sorted(names) == sorted(good)
        assert [os.fsencode(name) for name in store.rejects] == [bad]


def test_pictures_of_runs_are_not_data(tmp_path: Path) -> None:
    """When training on the current folder, the run and its picture lie below it."""
    write_photos(tmp_path, 6)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).touch()
    (run / "views.png").write_bytes(encoded(picture(30, 30), "PNG"))
    store = open_store(tmp_path)
    assert len(store) == 6
    assert store.classes == ["class0", "class1", "class2"]


# Splits


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["train", "val"], ("train", "val")),
        (["Train", "TEST"], ("Train", "TEST")),
        (["training", "validation"], ("training", "validation")),
        (["train", "test", "val"], ("train", "val")),
        (["train"], ("train", None)),
        (["train", "bus", "car"], (".", None)),  # here, train is a class
        (["test", "bus", "car"], (".", None)),
        (["dog", "cat"], (".", None)),
    ],
    ids=str,
)
def test_splits_are_found_by_their_names(
    tmp_path: Path, folders: list[str], expected: tuple[str, str | None]
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    train, test = find_splits(tmp_path)
    assert train == tmp_path / expected[0]
    assert test == (tmp_path / expected[1] if expected[1] else None)


@pytest.mark.parametrize("folders", [["val"], ["val", "test"]])
def test_test_splits_alone_are_refused(tmp_path: Path, folders: list[str]) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds val/ but no train/"):
        find_splits(tmp_path)


# Files that cannot be used


def test_unreadable_images_are_left_out_with_the_reason(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "good.jpg")
    write_image(tmp_path / "b" / "good.jpg")
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "b" / "page.jpg").write_text("<html>")
    (tmp_path / "b" / "cut.png").write_bytes(encoded(picture(20, 16), "PNG")[:20])
    for _ in range(2):  # the second time from the cache
        store = open_store(tmp_path)
        assert relative_names(store, tmp_path) == ["a/good.jpg", "b/good.jpg"]
        assert store.index["label"].tolist() == [0, 1]
        assert list(store.rejects) == ["a/empty.jpg", "b/cut.png", "b/page.jpg"]
        assert all(store.rejects.values())
        assert "not a JPEG, PNG, WebP or BMP" in store.rejects["b/page.jpg"]


def test_folders_without_a_usable_image_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("not an image")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("not an image")
    (tmp_path / "file").write_text("not a folder")
    for name, message in {
        "empty": " holds no image",
        "texts": " holds no image",
        "bad": ": none of its 1 images can be used; the first, a.jpg: ",
        "missing": " is not there",
        "file": " is not a folder",
    }.items():
        with pytest.raises(ValueError, match=f"{tmp_path / name}{message}"):
            open_store(tmp_path / name)


# The cache of the index


class OpenedFiles:
    """Notes which files below `root` are opened."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.names: list[str] = []
        original_open = builtins.open

        def noting_open(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and str(path).startswith(f"{root}{os.sep}"):
                self.names.append(os.path.relpath(path, root))
            return original_open(path, *arguments, **options)

        monkeypatch.setattr(builtins, "open", noting_open)

    def open_store(self) -> tuple[FolderStore, list[str]]:
        """The store of `root`, and the files that were read to open it."""
        self.names.clear()
        store = FolderStore(self.root)
        return store, sorted(self.names)


def test_unchanged_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photos(tmp_path / "photos", 9)
    (root / "class0" / "bad.jpg").write_text("not an image")
    opened = OpenedFiles(root, monkeypatch)
    first, read = opened.open_store()
    assert len(read) == 10
    second, read = opened.open_store()
    assert read == []
    assert np.array_equal(second.index, first.index)
    assert second.paths == first.paths
    assert second.classes == first.classes
    assert second.rejects == first.rejects
    assert len(second.rejects) == 1


def test_new_and_changed_files_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photos(tmp_path / "photos", 9)
    (root / "class0" / "bad.jpg").write_text("not an image")
    opened = OpenedFiles(root, monkeypatch)
    opened.open_store()

    write_image(root / "class0" / "bad.jpg", 33, 22)
    write_image(root / "class1" / "0001.jpg", 55, 44)
    write_image(root / "class1" / "new.jpg", 77, 66)
    same_size = root / "class2" / "0002.jpg"
    same_size.write_bytes(encoded(picture(12, 13)).ljust(same_size.stat().st_size, b"\0"))
    os.utime(same_size, ns=(0, 1))
    same_time = root / "class2" / "0005.jpg"  # as after `cp -p`
    status = same_time.stat()
    write_image(same_time, 10, 9)
    os.utime(same_time, ns=(status.st_atime_ns, status.st_mtime_ns))
    (root / "class0" / "0000.jpg").unlink()

    store, read = opened.open_store()
    assert read == [
        "class0/bad.jpg",
        "class1/0001.jpg",
        "class1/new.jpg",
        "class2/0002.jpg",
        "class2/0005.jpg",
    ]
    assert store.rejects == {}
    sizes = dict(zip(store.paths, sizes_of(store), strict=True))
    assert "class0/0000.jpg" not in sizes
    assert [sizes[name] for name in read] == [(33, 22), (55, 44), (77, 66), (12, 13), (10, 9)]
    assert opened.open_store()[1] == []


def test_a_file_that_becomes_bad_is_noticed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg")
    assert len(open_store(tmp_path)) == 2
    (tmp_path / "a.jpg").write_bytes(b"")
    assert list(open_store(tmp_path).rejects) == ["a.jpg"]


@pytest.mark.parametrize(
    "damage", ["empty", "noise", "half", "foreign arrays", "pickle", "a folder"]
)
def test_a_damaged_cache_does_no_harm(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "cache"))
    root = write_photos(tmp_path / "photos", 6)
    fresh = FolderStore(root)
    (cache,) = (tmp_path / "cache").iterdir()
    if damage == "foreign arrays":
        np.savez(cache, paths=np.arange(3), index=np.zeros(6))
    elif damage == "pickle":
        np.savez(cache, paths=np.array([object()], dtype=object), index=np.array([None]))
    elif damage == "a folder":
        cache.unlink()
        (cache / "in the way").mkdir(parents=True)
    elif damage == "half":
        content = cache.read_bytes()
        cache.write_bytes(content[: len(content) // 2])
    else:
        cache.write_bytes({"empty": b"", "noise": bytes(range(256))}[damage])
    again = FolderStore(root)
    assert np.array_equal(again.index, fresh.index)
    assert again.paths == fresh.paths
    assert list((tmp_path / "cache").iterdir()) == [cache], "no temporary file is left"


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "file" / "cache"))
    root = write_photos(tmp_path / "photos", 6)
    assert len(open_store(root)) == 6


def test_the_environment_names_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TWINFEED_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "twinfeed"
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_progress_counts_every_file(photos: Path) -> None:
    progress: list[tuple[int, int]] = []
    open_store(photos, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (60, 60)
    assert progress == sorted(progress)


# Reading


def test_a_pickled_store_reads_the_same(photos: Path) -> None:
    store = open_store(photos)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read_batch(np.arange(60)) == store.read_batch(np.arange(60))
    assert np.array_equal(copy.index, store.index)
    assert copy.classes == store.classes


def test_files_that_vanish_read_as_empty(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.jpg")
    store = open_store(tmp_path)
    (tmp_path / "1.jpg").unlink()
    assert [bool(data) for data in store.read_batch(np.arange(3))] == [True, False, True]
