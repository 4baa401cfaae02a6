"""A loader and a store whose images are deleted or out of reach."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline import Batch, LoaderOptions, barlow_twins, open_loader, open_store
from pipeline.stores import FolderStore
from pipeline.stores import folder as folder_store
from tests.helpers.images import write_photos


def store_without_files(root: Path, images: int = 100_000) -> FolderStore:
    """A store as it was after indexing many files, which have been deleted since."""
    store = FolderStore.__new__(FolderStore)
    store.root = root
    store.classes = ["class"]
    store.rejects = {}
    store.paths = [f"class/{i}.jpg" for i in range(images)]
    store.index = np.zeros(images, dtype=[("label", "i4"), ("height", "i4"), ("width", "i4")])
    store.index["height"] = 64
    store.index["width"] = 64
    (root / "class").mkdir(parents=True)
    (root / "other").mkdir()
    return store


def first_batch(store: FolderStore, batch_size: int, **options: Any) -> Batch:
    loader_options = LoaderOptions(batch_size=batch_size, threads=2, **options)
    loader = open_loader(store, barlow_twins(16), loader_options)
    return next(loader.epoch(0))


@pytest.mark.parametrize("batch_size", [8, 256, 4096])
def test_if_all_images_are_deleted_the_loader_gives_up_soon(
    tmp_path: Path, batch_size: int
) -> None:
    began = time.monotonic()
    message = (
        r"\d+ consecutive images cannot be decoded: \d+ of 100000 .* "
        r"for example: .*/class/\d+.jpg: "
    )
    with pytest.raises(ValueError, match=message):
        first_batch(store_without_files(tmp_path / "photos"), batch_size)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("missing", ["photos", "photos/class", "."])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("decoder", pipeline.FOR_ANY_STORE)
def test_a_folder_that_is_gone_is_named(
    tmp_path: Path, missing: str, shuffle: bool, decoder: str
) -> None:
    root = tmp_path / "data" / "photos"
    store = store_without_files(root)
    threads = set(threading.enumerate())
    (tmp_path / "data" / missing).rename(tmp_path / "elsewhere")
    named = root / "class" if missing == "photos/class" else root
    with pytest.raises(
        OSError, match=rf"the images in {named} cannot be read: No such file"
    ) as caught:
        first_batch(store, 64, decoder=decoder, shuffle=shuffle)
    # The text of a FileNotFoundError would be a number, without the remedy.
    assert not isinstance(caught.value, FileNotFoundError)
    assert set(threading.enumerate()) == threads


def test_an_empty_root_is_reported_as_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    store = store_without_files(tmp_path / "photos")
    for folder in ("class", "other"):
        (tmp_path / "photos" / folder).rmdir()
    with pytest.raises(OSError, match=r"photos cannot be read: it is empty"):
        first_batch(store, 64)


@pytest.mark.parametrize(
    "error_number",
    [errno.EACCES, errno.EIO, errno.ENOTCONN, errno.ESTALE],
    ids=errno.errorcode.get,
)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_an_unreadable_file_is_a_bad_image_but_an_unreadable_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int, whole_folder: bool
) -> None:
    root = write_photos(tmp_path / "photos", 3)
    store = open_store(root)

    def failing(*_: object) -> Any:
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(folder_store, "open", failing, raising=False)
    if not whole_folder:
        assert store.read_batch(np.array([1])) == [b""]
        return
    monkeypatch.setattr(os, "scandir", failing)
    message = f"the images in {root} cannot be read: {os.strerror(error_number)}"
    with pytest.raises(OSError, match=message):
        store.read_batch(np.array([1]))


def test_too_many_open_files_is_not_blamed_on_an_image(tmp_path: Path) -> None:
    store = open_store(write_photos(tmp_path / "photos", 3))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        first_free_number = file.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free_number, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 24\] Too many open files"):
            store.read_batch(np.array([1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_many_bad_images_are_replaced_as_long_as_there_are_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of ten images: more than may be bad in a row, but with good ones between them."""
    monkeypatch.setattr(pipeline.loader, "_BAD_IN_A_ROW", 40)
    store = open_store(write_photos(tmp_path / "photos", 400))
    for sample in range(400):
        if sample % 10:
            Path(store.name(sample)).write_bytes(b"\xff\xd8 overwritten")
    loader = open_loader(store, barlow_twins(16), LoaderOptions(batch_size=8, threads=2))
    assert all(sample % 10 == 0 for sample in next(loader.epoch(0)).samples.tolist())
    assert len(loader.bad) > 40
