"""A folder of JPEG, PNG, WebP and BMP files, nested to any depth; the first level of sub-folders names the classes.

Opening one walks it, and reads the header of each file that is new or changed since the last time: sizes are needed
before decoding, to draw crops. What was found is kept in the cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_write
from ..images import SUFFIXES, BadImage, image_size
from ..order import Samples
from . import Progress, Store, Subset, cache_folder, first_names, join_names, split_names

_INDEX = np.dtype(
    [("label", "i4"), ("height", "i4"), ("width", "i4"), ("bytes", "i8"), ("modified_ns", "i8")]
)
_PROBES = 512  # files handed to the threads at a time: a million at once would take gigabytes of bookkeeping
_HEADER_BYTES = (
    16_384  # enough for the size of most JPEGs; the rest of a file is read only where it is not
)
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what no file is to blame for
TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test")


class FolderStore:
    """Images below `root`. `rejects` names those left out, with the reason; progress(done, total) while indexing.

    Raises ValueError where `root` is no folder or holds no image that can be used.
    """

    def __init__(self, root: Path, progress: Progress = lambda done, total: None) -> None:
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise ValueError(
                f"{root} is {'no folder' if self.root.exists() else 'not there'}: name a folder of images"
            )
        unreadable: dict[str, str] = {}
        paths = sorted(walk_images(self.root, unreadable))
        if not paths:
            raise ValueError(
                f"{root} holds no image: looked for {', '.join(SUFFIXES)} files in it, to any depth"
            )
        found, rejects = _index(self.root, paths, progress)
        self.rejects = unreadable | rejects
        good = np.flatnonzero(found["height"] > 0)
        if not len(good):
            name, reason = next(iter(self.rejects.items()))
            raise ValueError(
                f"{root}: none of its {len(paths)} images can be used; the first, {name}: {reason}"
            )
        self.paths = [paths[i] for i in good]
        self.index = found[good]
        self.classes = class_folders(self.paths)
        if self.classes:
            numbers = {name: i for i, name in enumerate(self.classes)}
            self.index["label"] = [numbers[path.partition(os.sep)[0]] for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read_batch(self, samples: Samples) -> list[bytes]:
        return [self._read(self.paths[sample]) for sample in samples]

    def name(self, sample: int) -> str:
        return str(self.root / self.paths[sample])

    def _read(self, path: str) -> bytes:
        try:
            with open(os.path.join(self.root, path), "rb") as file:
                return file.read()
        except OSError as error:
            check_folders(self.root, path, error)
            return b""


def subset_from_list(store: Store, path: Path) -> Subset:
    """The samples that a list names, one a line: `n01440764_123.JPEG` as SimCLR's, or by the path in the folder.

    ValueError for names that are not there or could be several images, and for a store that is no folder.
    """
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # which Windows puts first
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}. Name a list of images, one a line") from None
    names = {
        os.fsdecode(line.strip()).replace("/", os.sep): None
        for line in text.splitlines()
        if line.strip()
    }
    positions, folder = np.arange(len(store), dtype=np.int64), store
    while isinstance(folder, Subset):
        positions, folder = folder.samples[positions], folder.store
    if not isinstance(folder, FolderStore):
        raise ValueError(
            f"{path} names files, which {store.name(0)} has not kept: name the folder, or give a fraction"
        )
    samples: dict[str, int] = {}
    several: set[str] = set()
    for sample, position in enumerate(positions):
        own = folder.paths[position]
        several |= {
            name
            for name in {own, os.path.basename(own)}
            if samples.setdefault(name, sample) != sample
        }
    for wrong, what in (
        ([name for name in names if name not in samples], f"are not in {folder.root}"),
        (
            [name for name in names if name in several],
            "are several images there, and want their paths",
        ),
    ):
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} of its {len(names)} names {what}: {first_names(wrong)}"
            )
    if not names:
        raise ValueError(f"{path} names no image: it should hold a name a line")
    return Subset(store, np.unique([samples[name] for name in names]))


def check_kind(about: os.stat_result) -> None:
    """`BadImage` for what has the name of an image but would be waited for, or read, without end."""
    if not stat.S_ISREG(about.st_mode):
        raise BadImage("it is a pipe or a device, not a file")


def check_folders(root: Path, path: str, error: OSError) -> None:
    """An image that is gone is one bad image, but a folder that is gone is an OSError, which names the highest.

    An unmounted disk would otherwise be found out image by image, and until then be trained on by stand-ins.
    """
    if error.errno in _OURS:
        raise error
    for folder in (root / parent for parent in reversed(Path(path).parents)):
        try:
            with os.scandir(folder) as entries:
                reason = None if next(entries, None) or folder != root else "it is empty"
        except OSError as closed:
            reason = closed.strerror or str(closed)
        if reason:
            raise OSError(
                f"the images in {folder} are out of reach: {reason}. Mount or restore it"
            ) from error


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """What to train and to test on: `train` and `val` (or `test`) in `root`, else `root` and None.

    Both are folders, or both are .beton files. A `train` beside other folders, none of which is a test split, is a
    class that is called so.
    """
    folders: dict[str, Path] = {}
    betons: dict[str, Path] = {}
    for entry in (
        os.scandir(root) if root.is_dir() else ()
    ):  # asks nothing about each of a million images
        if entry.is_dir():
            folders[entry.name.lower()] = root / entry.name
        elif entry.name.endswith(".beton"):
            betons[entry.name[: -len(".beton")].lower()] = root / entry.name
    if betons.keys() & {*TRAIN} and betons.keys() & {*TEST}:
        folders |= betons
    train, test = (
        next((folders[name] for name in names if name in folders), None) for names in (TRAIN, TEST)
    )
    if test is not None and folders.keys() <= {*TEST}:
        raise ValueError(
            f"{root} holds {test.name}/ but no train/: name the folder of images to train on"
        )
    if train is None or (test is None and len(folders) > 1):
        return root, None
    return train, test


def walk_images(root: Path, unreadable: dict[str, str]) -> Iterator[str]:
    """Paths of images relative to `root`; links are followed, each folder is entered once, hidden ones never.

    Folders that cannot be listed are added to `unreadable`, with the reason.
    """
    entered = set()

    def note(error: OSError) -> None:
        unreadable[os.path.relpath(error.filename, root)] = error.strerror or str(error)

    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered or {"config.json", "metrics.jsonl"} <= set(
            files
        ):  # a run of ours: its picture is no data
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = "" if folder == str(root) else os.path.relpath(folder, root) + os.sep
        yield from (
            below + name
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )


def class_folders(paths: list[str]) -> list[str]:
    """The first-level folders, where there are at least two and no image lies beside them; else []."""
    first = {path.partition(os.sep)[0] if os.sep in path else "" for path in paths}
    return sorted(first) if len(first) > 1 and "" not in first else []


def _index(root: Path, paths: list[str], progress: Progress) -> tuple[NDArray[Any], dict[str, str]]:
    """Sizes of all images [n], height 0 for rejects; and why each was rejected. Known, unchanged files are not read."""
    cache = cache_folder() / f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"
    known_paths, known, known_rejects = _load(cache)
    position = {path: i for i, path in enumerate(known_paths)}
    rejects: dict[str, str] = {}

    def probe(path: str) -> Any:
        full = os.path.join(root, path)
        try:
            about = os.stat(full)
            stamp = about.st_size, about.st_mtime_ns
            i = position.get(path)
            if i is not None and (known[i]["bytes"], known[i]["modified_ns"]) == stamp:
                if path in known_rejects:
                    rejects[path] = known_rejects[path]
                return known[i]
            check_kind(about)
            return np.array((-1, *_file_size(full), *stamp), dtype=_INDEX)
        except BadImage as error:
            rejects[path] = str(error)
            return np.array((-1, 0, 0, *stamp), dtype=_INDEX)
        except OSError as error:
            rejects[path] = error.strerror or str(error)
            return np.array((-1, 0, 0, 0, 0), dtype=_INDEX)

    found = np.empty(len(paths), dtype=_INDEX)
    with ThreadPoolExecutor(
        min(32, 4 * (os.cpu_count() or 1))
    ) as pool:  # waits for the disk, mostly
        for first in range(0, len(paths), _PROBES):
            part = paths[first : first + _PROBES]
            for i, row in enumerate(pool.map(probe, part), first):
                found[i] = row
            progress(first + len(part), len(paths))
    rejects = dict(sorted(rejects.items()))
    if known_paths != paths or not np.array_equal(known, found):
        _save(cache, paths, found, rejects)
    return found, rejects


def _file_size(path: str) -> tuple[int, int]:
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
        if head[:2] == b"\xff\xd8":
            try:
                return image_size(head)
            except BadImage:  # a long EXIF or colour profile stands before the size
                pass
        return image_size(head + file.read())


def _load(cache: Path) -> tuple[list[str], NDArray[Any], dict[str, str]]:
    """Paths, index and rejects as saved; nothing where there is no cache or it is damaged: it is only a shortcut."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as saved:
            paths, names, reasons = (
                split_names(saved[key]) for key in ("paths", "rejects", "reasons")
            )
            index = saved["index"]
        if index.dtype == _INDEX and len(index) == len(paths):
            return paths, index, dict(zip(names, reasons, strict=True))
    except Exception:
        pass
    return [], np.empty(0, dtype=_INDEX), {}


def _save(cache: Path, paths: list[str], index: NDArray[Any], rejects: dict[str, str]) -> None:
    names = {"paths": paths, "rejects": rejects, "reasons": rejects.values()}
    arrays: dict[str, Any] = {key: join_names(texts) for key, texts in names.items()}
    with suppress(OSError):  # a read-only or full disk costs a new scan the next time, not this run
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache, concurrent=True) as file:
            np.savez(file, index=index, **arrays)
