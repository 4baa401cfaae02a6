"""Folders of images as people have them, and what is remembered about them."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import (
    Subset,
    cache_folder,
    find_splits,
    fingerprint,
    hold_out,
    open_store,
    random_subset,
)
from pipeline.stores.folder import FolderStore
from tests.helpers.images import encoded, picture, write_photos


def put(path: Path, width: int = 20, height: int = 16, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        encoded(picture(width, height, seed), "PNG" if path.suffix.lower() == ".png" else "JPEG")
    )
    return path


def names(store: Any, root: Path) -> list[str]:
    return [os.path.relpath(store.name(i), root) for i in range(len(store))]


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sub_folders_are_classes_and_images_lie_at_any_depth_below(tmp_path: Path) -> None:
    for name in ("dog/a.jpg", "dog/deep/deeper/b.PNG", "cat/c.JPEG", "ant/d.webp", "dog/e.Jpg"):
        put(tmp_path / name)
    store = open_store(tmp_path)
    assert store.classes == ["ant", "cat", "dog"]
    found = names(store, tmp_path)
    assert found == ["ant/d.webp", "cat/c.JPEG", "dog/a.jpg", "dog/deep/deeper/b.PNG", "dog/e.Jpg"]
    assert [store.classes[label] for label in store.index["label"]] == [
        name.split("/")[0] for name in found
    ]
    assert store.rejects == {}


@pytest.mark.parametrize(
    "files",
    [["a.jpg", "b.jpg"], ["a.jpg", "dog/b.jpg", "cat/c.jpg"], ["dog/a.jpg", "dog/b/c.jpg"]],
    ids=str,
)
def test_images_beside_folders_or_in_a_single_one_have_no_labels(
    tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        put(tmp_path / name)
    store = open_store(tmp_path)
    assert store.classes == []
    assert store.index["label"].tolist() == [-1] * len(files)


def test_sizes_and_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    sizes = [(20, 33), (41, 7), (5, 5)]
    paths = [put(tmp_path / f"{i}.jpg", *size, seed=i) for i, size in enumerate(sizes)]
    store = open_store(str(tmp_path))
    assert list(zip(store.index["width"], store.index["height"], strict=True)) == sizes
    assert store.read_batch(np.array([2, 0, 2])) == [paths[i].read_bytes() for i in (2, 0, 2)]


def test_a_png_named_jpg_and_a_size_behind_a_long_profile_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(31, 17), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(23, 11), icc_profile=bytes(100_000)))
    (tmp_path / "c.png").write_bytes(encoded(picture(40, 50)))
    index = open_store(tmp_path).index
    assert list(zip(index["width"], index["height"], strict=True)) == [(31, 17), (23, 11), (40, 50)]


def test_hidden_and_other_files_are_no_images(tmp_path: Path) -> None:
    put(tmp_path / "a" / "good.jpg")
    put(tmp_path / "b" / "good.jpg")
    for name in (".hidden.jpg", ".git/c.jpg", "a/.thumbs/d.jpg", "a/._good.jpg"):
        put(tmp_path / name)
    for name in ("readme.txt", "a/list.csv", "b/jpg", "b/x.jpg.part"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "b" / "folder.jpg").mkdir()
    store = open_store(tmp_path)
    assert names(store, tmp_path) == ["a/good.jpg", "b/good.jpg"]
    assert store.rejects == {}
    assert store.classes == ["a", "b"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path / "data" / "dog" / "a.jpg")
    put(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "data" / "dog" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "dog" / "self").symlink_to(
        tmp_path / "data" / "dog", target_is_directory=True
    )
    (tmp_path / "data" / "wolf").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data" / "dog" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "data" / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    store = open_store(tmp_path / "data")
    assert names(store, tmp_path / "data") == ["dog/a.jpg", "dog/file.jpg", "wolf/b.jpg"]
    assert list(store.rejects) == ["dog/gone.jpg"]
    assert "No such file" in store.rejects["dog/gone.jpg"]


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    for name in (
        b"\xff\xfe.jpg",
        b"two\nlines.jpg",
        "größer 猫.jpg".encode(),
        b"-rf *.jpg",
        b"bad\xff\n.jpg",
    ):
        Path(
            os.path.join(os.fsencode(tmp_path), name).decode(errors="surrogateescape")
        ).write_bytes(encoded(picture(20, 16)) if b"bad" not in name else b"no image")
    for _ in range(2):  # the second time from the cache
        store = pickle.loads(pickle.dumps(open_store(tmp_path)))
        assert len(store) == 4
        assert all(store.read_batch(np.arange(4)))
        assert {os.fsencode(os.path.basename(store.name(i))) for i in range(4)} > {
            b"\xff\xfe.jpg",
            b"two\nlines.jpg",
        }
        assert [os.fsencode(name) for name in store.rejects] == [b"bad\xff\n.jpg"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["train", "val"], ("train", "val")),
        (["Train", "TEST"], ("Train", "TEST")),
        (["training", "validation"], ("training", "validation")),
        (["train", "test", "val"], ("train", "val")),
        (["train"], ("train", None)),
        (["train", "bus", "car"], (".", None)),  # a class that is called so
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
def test_test_splits_alone_are_not_trained_on(tmp_path: Path, folders: list[str]) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"holds val/ but no train/"):
        find_splits(tmp_path)


def test_the_folder_of_a_run_is_no_data(tmp_path: Path) -> None:
    """Where someone trains on the folder that they stand in, the run's own picture lies below it."""
    write_photos(tmp_path, 6)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).touch()
    (run / "views.png").write_bytes(encoded(picture(30, 30), "PNG"))
    store = open_store(tmp_path)
    assert len(store) == 6
    assert store.classes == ["class0", "class1", "class2"]


# ── what cannot be used ──────────────────────────────────────────────────────────────────────────────────────────────


def test_unreadable_images_are_left_out_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path / "a" / "good.jpg")
    put(tmp_path / "b" / "good.jpg")
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "b" / "page.jpg").write_text("<html>")
    (tmp_path / "b" / "cut.png").write_bytes(encoded(picture(20, 16), "PNG")[:20])
    for _ in range(2):  # the second time from the cache
        store = open_store(tmp_path)
        assert names(store, tmp_path) == ["a/good.jpg", "b/good.jpg"]
        assert store.index["label"].tolist() == [0, 1]
        assert list(store.rejects) == ["a/empty.jpg", "b/cut.png", "b/page.jpg"]
        assert all(store.rejects.values())
        assert "not a JPEG, PNG, WebP or BMP" in store.rejects["b/page.jpg"]


def test_folders_without_a_usable_image_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("no image")
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "a.jpg").write_text("no image")
    (tmp_path / "file").write_text("no folder")
    for name, reason in {
        "empty": "holds no image",
        "texts": "holds no image",
        "spoilt": "none of its 1 images can be used; the first, a.jpg: ",
        "missing": "is not there",
        "file": "is not a folder",
    }.items():
        with pytest.raises(
            ValueError, match=f"{tmp_path / name}.* {reason}|{tmp_path / name}: {reason}"
        ):
            open_store(tmp_path / name)


# ── the index cache ──────────────────────────────────────────────────────────────────────────────────────────────────


class Opened:
    """Counts the files below `root` that are opened."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        really_open = builtins.open

        def counted(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | Path) and str(path).startswith(f"{root}{os.sep}"):
                self.names.append(os.path.relpath(path, root))
            return really_open(path, *arguments, **options)

        monkeypatch.setattr(builtins, "open", counted)

    def by(self, root: Path) -> tuple[FolderStore, list[str]]:
        """The store, and what opening it read."""
        self.names.clear()
        store = FolderStore(root)
        return store, sorted(self.names)


def test_only_new_and_changed_files_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photos(tmp_path / "photos", 9)
    (root / "class0" / "bad.jpg").write_text("no image")
    opened = Opened(root, monkeypatch)
    first, read = opened.by(root)
    assert len(read) == 10
    second, read = opened.by(root)
    assert read == []
    assert np.array_equal(first.index, second.index)
    assert (first.paths, first.classes, first.rejects) == (
        second.paths,
        second.classes,
        second.rejects,
    )
    assert len(second.rejects) == 1

    put(root / "class1" / "new.jpg", 77, 66)
    put(root / "class1" / "0001.jpg", 55, 44)
    path = root / "class2" / "0002.jpg"
    path.write_bytes(
        encoded(picture(12, 13)).ljust(path.stat().st_size, b"\0")
    )  # of the same length
    os.utime(path, ns=(0, 1))
    path = root / "class2" / "0005.jpg"
    stat = path.stat()
    os.utime(
        put(path, 10, 9), ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # of the same time, as `cp -p` makes it
    (root / "class0" / "0000.jpg").unlink()
    put(root / "class0" / "bad.jpg", 33, 22)
    third, read = opened.by(root)
    assert read == [
        "class0/bad.jpg",
        "class1/0001.jpg",
        "class1/new.jpg",
        "class2/0002.jpg",
        "class2/0005.jpg",
    ]
    assert third.rejects == {}
    sizes = {
        name: (int(row["width"]), int(row["height"]))
        for name, row in zip(third.paths, third.index, strict=True)
    }
    assert "class0/0000.jpg" not in sizes
    assert [sizes[name] for name in read] == [(33, 22), (55, 44), (77, 66), (12, 13), (10, 9)]
    assert opened.by(root)[1] == []


def test_a_file_that_turned_bad_is_noticed(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.jpg")
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
    content = cache.read_bytes()
    if damage == "foreign arrays":
        np.savez(cache, paths=np.arange(3), index=np.zeros(6))
    elif damage == "pickle":
        np.savez(cache, paths=np.array([object()], dtype=object), index=np.array([None]))
    elif damage == "a folder":
        cache.unlink()
        (cache / "in the way").mkdir(parents=True)
    else:
        cache.write_bytes(
            {"empty": b"", "noise": bytes(range(256)), "half": content[: len(content) // 2]}[damage]
        )
    again = FolderStore(root)
    assert np.array_equal(again.index, fresh.index)
    assert again.paths == fresh.paths
    assert list((tmp_path / "cache").iterdir()) == [cache]  # nothing half-written is left beside it


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "file" / "cache"))
    root = write_photos(tmp_path / "photos", 6)
    assert len(open_store(root)) == 6


def test_the_cache_folder_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TWINFEED_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "twinfeed"
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_progress_counts_every_file(photos: Path) -> None:
    said: list[tuple[int, int]] = []
    open_store(photos, lambda done, total: said.append((done, total)))
    assert said[-1] == (60, 60)
    assert said == sorted(said)


# ── parts of stores ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pickled_store_reads_the_same(photos: Path) -> None:
    store = open_store(photos)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read_batch(np.arange(60)) == store.read_batch(np.arange(60))
    assert np.array_equal(copy.index, store.index)
    assert copy.classes == store.classes


def test_files_that_vanish_read_as_empty(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.jpg")
    store = open_store(tmp_path)
    (tmp_path / "1.jpg").unlink()
    assert [bool(data) for data in store.read_batch(np.arange(3))] == [True, False, True]


def test_a_subset_maps_names_bytes_and_labels(photos: Path) -> None:
    store, chosen = open_store(photos), np.array([41, 3, 17])
    part = pickle.loads(pickle.dumps(Subset(store, chosen)))
    assert len(part) == 3
    assert part.read_batch(np.array([2, 0])) == store.read_batch(np.array([17, 41]))
    assert [part.name(i) for i in range(3)] == [store.name(i) for i in chosen.tolist()]
    assert np.array_equal(part.index, store.index[chosen])
    assert part.classes == store.classes


def test_holding_out_divides_the_store_by_the_seed(photos: Path) -> None:
    store = open_store(photos)
    train, held = hold_out(store, 0.2, seed=0)
    assert (len(train), len(held)) == (48, 12)
    assert sorted([*train.samples, *held.samples]) == list(range(60))
    assert np.array_equal(hold_out(store, 0.2, seed=0)[1].samples, held.samples)
    others = [hold_out(store, 0.2, seed)[1].samples.tolist() for seed in range(200)]
    assert len({tuple(samples) for samples in others}) == 200
    times = np.bincount(
        np.concatenate(others), minlength=60
    )  # held out 40 times each, give or take 5.7
    assert times.min() > 40 - 5 * 5.7
    assert times.max() < 40 + 5 * 5.7
    assert len(hold_out(store, 0.001, seed=0)[1]) == 1


def test_at_most_takes_so_many_at_random_or_all(photos: Path) -> None:
    store = open_store(photos)
    assert random_subset(60, store) is store
    part = random_subset(10, store)
    assert len({part.name(i) for i in range(10)}) == len(part) == 10
    assert {part.name(i) for i in range(10)} != {store.name(i) for i in range(10)}


def test_other_labels_or_sizes_have_another_fingerprint(photos: Path) -> None:
    store = open_store(photos)
    seen = {fingerprint(store), fingerprint(Subset(store, np.arange(59)))}
    for field in ("label", "height", "width"):
        changed = open_store(photos)
        changed.index[field][7] += 1
        seen.add(fingerprint(changed))
    assert len(seen) == 5
    assert fingerprint(open_store(photos)) == fingerprint(store)
