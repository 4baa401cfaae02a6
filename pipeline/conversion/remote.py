"""Opens URLs of fsspec, and paths with patterns in them.

Images go to a staging file; parquet files are downloaded and staged one by one; record files are
downloaded and opened. Names that a server gives never become paths here.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..formats import FORMATS
from ..images import SUFFIXES
from ..stores import Progress, join_names
from ..stores.image_files import TEST_NAMES, TRAIN_NAMES
from .local import classes_by_folder, open_local
from .optional_imports import import_extra
from .parquet import check_splits, stage_parquet
from .source_types import Source, digest
from .staging import Item, stage

_IMAGES_IN_MEMORY = 128
_DOWNLOAD_THREADS = 32
_RETRY_WAITS_S = (1, 2, 4, 8)  # after each attempt that a network fails
_FORBIDDEN_STATUS = (401, 403, 410)  # of HTTP: another attempt would not help


@dataclass(frozen=True)
class _RemoteFiles:
    """Files of one kind."""

    spec: str  # as the user has named them
    filesystem: Any  # of fsspec
    root: str  # the folder that they have in common
    paths: list[str]
    is_folder: bool  # whether `spec` names the folder

    def names(self) -> list[str]:
        """Their paths relative to `root`."""
        names = [path[len(self.root) + 1 :] for path in self.paths]
        return [unquote(name) for name in names] if "http" in self.filesystem.protocol else names

    def digest(self) -> str:
        return digest(join_names(self.paths))

    def identity(self) -> str:
        return f"{self.spec}\n{self.digest()}"


def open_remote(spec: str, progress: Progress, scratch: Path) -> Source:
    """The images at a URL, for `open_source`.

    Raises:
        ValueError: Nothing is there, or files of several kinds.
        OSError: The network fails.
    """
    filesystem, paths = _find_paths(spec)
    is_folder = len(paths) == 1 and _file_kind(paths[0]) is None
    if is_folder:
        root = paths[0].rstrip("/")
        if "file" in filesystem.protocol:
            return open_local(Path(root), progress, scratch)
        paths = _list_folder(filesystem, root)
    else:
        # Not os.path.commonpath, which breaks URLs.
        root = os.path.dirname(os.path.commonprefix(paths))  # noqa: RUF071
    kinds = {_file_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{spec}: name one folder, or files of one kind")

    files = _RemoteFiles(spec, filesystem, root, paths, is_folder)
    kind = kinds.pop() if kinds else None
    if kind is None:
        return _stage_images(files, progress, scratch)
    if kind == ".parquet":
        return _stage_parquet(files, progress, scratch)
    return _download_records(files, kind, progress, scratch)


def _find_paths(spec: str) -> tuple[Any, list[str]]:
    """The file system of a URL, and the paths that it names there."""
    try:
        url_to_fs = import_extra("fsspec").core.url_to_fs
        opened = [url_to_fs(url) for url in _expand_braces(spec)]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{spec} cannot be opened: {error}") from error
    paths: list[str] = []
    for filesystem, path in opened:
        if "*" in path:
            paths += sorted(_with_retries(filesystem.glob, path))
        else:
            paths.append(path)
    if not paths:
        raise ValueError(f"{spec} matches no file")
    return opened[0][0], paths


def _expand_braces(spec: str) -> list[str]:
    """`a-{00..12}.tar` as a-00.tar ... a-12.tar."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not braces:
        return [spec]
    first, last = braces.groups()
    expanded: list[str] = []
    for number in range(int(first), int(last) + 1):
        expanded += _expand_braces(spec.replace(braces[0], f"{number:0{len(first)}}", 1))
    return expanded


def _list_folder(filesystem: Any, root: str) -> list[str]:
    """The record files in a folder or the parquet files below it; if there are none, all others.

    Record files further below are archives among images.
    """
    found = sorted(_with_retries(filesystem.find, root))
    records: list[str] = []
    for path in found:
        kind = _file_kind(path)
        if kind == ".parquet" or (kind is not None and os.path.dirname(path) == root):
            records.append(path)
    return records or [path for path in found if _file_kind(path) is None]


def _file_kind(path: str) -> str | None:
    """The suffix of a parquet or record file, None for others; TFRecords have a number after it."""
    suffixes = (".parquet", *(format.SUFFIX for format in FORMATS.values()))
    alternatives = "|".join(re.escape(suffix) for suffix in suffixes)
    match = re.search(rf"({alternatives})(-\d+-of-\d+)?$", urlsplit(path).path)
    return match[1] if match else None


def _stage_images(files: _RemoteFiles, progress: Progress, scratch: Path) -> Source:
    paths = {
        name: path
        for name, path in zip(files.names(), files.paths, strict=True)
        if name.lower().endswith(SUFFIXES) and "/." not in f"/{name}"  # no hidden files
    }
    names = list(paths)
    folders = {name.partition("/")[0].lower() for name in names}
    if folders.intersection(TRAIN_NAMES) and folders.intersection(TEST_NAMES):
        raise ValueError(
            f"{files.spec} holds {' and '.join(sorted(folders))}: convert each separately"
        )
    classes, numbers = classes_by_folder(names)
    labels = [None if number < 0 else number for number in numbers.tolist()]

    def download(name: str) -> bytes | str:
        try:
            return _with_retries(files.filesystem.cat_file, paths[name])
        except FileNotFoundError as error:
            return str(error)

    pool = ThreadPoolExecutor(_DOWNLOAD_THREADS)
    # Part by part: `map` over all names would hold all images in memory.
    images = (
        image
        for first in range(0, len(names), _IMAGES_IN_MEMORY)
        for image in pool.map(download, names[first : first + _IMAGES_IN_MEMORY])
    )
    try:
        items = (Item(*fields) for fields in zip(names, images, labels, strict=True))
        return stage(items, classes, scratch, files.identity(), progress, len(names))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _stage_parquet(files: _RemoteFiles, progress: Progress, scratch: Path) -> Source:
    names = files.names()
    check_splits(files.spec, names)
    download = scratch / "fetched.parquet"  # one file at a time
    copies = (_download(files.filesystem, path, download) for path in files.paths)
    source = stage_parquet(zip(names, copies, strict=True), files.identity(), progress, scratch)
    download.unlink(missing_ok=True)
    return source


def _download_records(files: _RemoteFiles, kind: str, progress: Progress, scratch: Path) -> Source:
    """Record files, downloaded under numbers instead of names; those that are there are kept."""
    folder = scratch / f"fetched-{files.digest()}"
    folder.mkdir(exist_ok=True)
    copies = [folder / f"{number:06d}{kind}" for number in range(len(files.paths))]
    for number, (path, copy) in enumerate(zip(files.paths, copies, strict=True), 1):
        if not copy.exists():
            _download(files.filesystem, path, copy)
        progress(number, len(files.paths))

    if files.is_folder or len(files.paths) > 1:
        original, target = files.root, folder
    else:
        original, target = files.paths[0], copies[0]
    with suppress(FileNotFoundError):  # what convert.py wrote: the names of the classes
        _download(files.filesystem, f"{original}.json", target.with_name(f"{target.name}.json"))
    return open_local(target, progress, scratch)


def _download(filesystem: Any, path: str, to: Path) -> Path:
    """Make `to` a copy of the file at `path`, or a link to it if that is on this machine."""
    part = to.with_name(f"{to.name}.part")
    part.unlink(missing_ok=True)
    if "file" in filesystem.protocol:
        part.symlink_to(Path(path).resolve(strict=True))
    else:
        _with_retries(filesystem.get_file, path, str(part))
    return part.replace(to)


def _with_retries(call: Callable[..., Any], path: str, *arguments: str) -> Any:
    """The result of a call of a file system, which is repeated while the network fails.

    Raises:
        FileNotFoundError: The file does not exist, or may not be read.
        OSError: The network fails again and again, or the disk here is full.
    """
    waits = iter(_RETRY_WAITS_S)
    while True:
        try:
            return call(path, *arguments)
        except Exception as error:  # the libraries below fsspec have no exception in common
            is_refused = getattr(error, "status", 0) in _FORBIDDEN_STATUS
            if is_refused or isinstance(error, FileNotFoundError | PermissionError):
                raise FileNotFoundError(
                    f"{path} does not exist, or is not public ({error})"
                ) from error
            wait_s = next(waits, None)
            disk_is_full = getattr(error, "errno", 0) == errno.ENOSPC
            if wait_s is None or disk_is_full:
                raise OSError(
                    f"{path} cannot be downloaded: {error or type(error).__name__}"
                ) from error
            time.sleep(wait_s)
