"""Image files below a folder: finding them, their classes and splits; bad files and lost disks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ..images import SUFFIXES, BadImage

TRAIN_NAMES = ("train", "training")  # of the folder, or beton, to train on
TEST_NAMES = ("val", "valid", "validation", "test")  # of those to test on, in order of preference

_RUN_FILES = {"config.json", "metrics.jsonl"}  # they show that a folder is that of a run
_RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the fault of any file


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """The training set and the test set in `root`: `train`, and `val` or `test`.

    Both are folders, or both are .beton files. If there is no `train`, they are `root` and None.
    Likewise if there are other folders beside `train`, but none with the name of a test split: then
    `train` is a class.

    Raises:
        ValueError: `root` holds test splits only.
    """
    folders: dict[str, Path] = {}
    betons: dict[str, Path] = {}
    # `scandir` needs no system call per entry, of which there may be a million.
    for entry in os.scandir(root) if root.is_dir() else ():
        if entry.is_dir():
            folders[entry.name.lower()] = root / entry.name
        elif entry.name.endswith(".beton"):
            betons[entry.name.removesuffix(".beton").lower()] = root / entry.name

    splits = dict(folders)
    if _first_of(betons, TRAIN_NAMES) and _first_of(betons, TEST_NAMES):
        splits.update(betons)
    train = _first_of(splits, TRAIN_NAMES)
    test = _first_of(splits, TEST_NAMES)
    if test is not None and set(splits) <= set(TEST_NAMES):
        raise ValueError(
            f"{root} holds {test.name}/ but no train/: name the folder of images to train on"
        )
    if train is None or (test is None and len(splits) > 1):
        return root, None
    return train, test


def _first_of(splits: dict[str, Path], names: Collection[str]) -> Path | None:
    return next((splits[name] for name in names if name in splits), None)


def walk_images(root: Path, unreadable: dict[str, str]) -> Iterator[str]:
    """The paths of all images below `root`, relative to it.

    Links are followed, but each folder is entered only once. Hidden files and folders, and the
    folders of runs with the pictures in them, are left out. Folders that cannot be listed are added
    to `unreadable`, with the reason.
    """

    def note_unreadable(error: OSError) -> None:
        unreadable[os.path.relpath(error.filename, root)] = error.strerror or str(error)

    entered = set()
    for folder, subfolders, files in os.walk(root, onerror=note_unreadable, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in entered or set(files) >= _RUN_FILES:
            subfolders.clear()
            continue
        entered.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = "" if folder == str(root) else os.path.relpath(folder, root) + os.sep
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield prefix + name


def class_folders(paths: Collection[str]) -> list[str]:
    """The names of the first-level folders, which are the classes.

    [] if there are fewer than two of them, or if an image lies beside them.
    """
    folders = set()
    for path in paths:
        folder, separator, _ = path.partition(os.sep)
        if not separator:
            return []
        folders.add(folder)
    return sorted(folders) if len(folders) > 1 else []


def check_is_file(status: os.stat_result) -> None:
    """Raise `BadImage` for a pipe or a device: reading it could block, or never end."""
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("it is a pipe or a device, not a file")


def check_folders(root: Path, path: str, error: OSError) -> None:
    """Raise OSError if reading `path` failed with `error` because one of its folders is gone.

    An image that is gone is one bad image, which the loader replaces. If a disk is unmounted, all
    its images are gone; without this check, training would go on with replacements only.
    The message names the highest of the folders that are out of reach.
    """
    if error.errno in _RESOURCE_ERRORS:
        raise error
    for parent in reversed(Path(path).parents):
        folder = root / parent
        try:
            with os.scandir(folder) as entries:
                is_empty = next(entries, None) is None
        except OSError as scan_error:
            reason = scan_error.strerror or str(scan_error)
        else:
            reason = "it is empty" if is_empty and folder == root else ""
        if reason:
            raise OSError(
                f"the images in {folder} cannot be read: {reason}. "
                "Is the disk still mounted? Mount or restore it"
            ) from error
