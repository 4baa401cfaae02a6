"""What `convert.py` reads: encoded images with labels, wherever they lie.

A folder of images, a data set of ours, Hugging Face's parquet files, a data set of torchvision, or URLs of fsspec's.
What can be read only once, or only over a network, is copied to a spool first. Nothing is unpickled but the files of
CIFAR, by torchvision, which checks their checksums before.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from ..formats import FORMATS, find_format
from ..formats.index import class_names
from ..images import SUFFIXES
from ..stores import Progress, cache_folder, join_names
from ..stores.folder import TEST, TRAIN, class_folders, find_splits, walk_images
from .staging import Files, Item, Records, Source, digest, spool, spooled

__all__ = ["Source", "open_source", "spooled"]

_IMAGES = (
    "image",
    "img",
    "image.bytes",
    "img.bytes",
    "image_bytes",
    "jpg",
    "png",
)  # columns, the best first
_LABELS = ("label", "labels", "fine_label", "target", "class", "cls")
_ROWS = 16  # of a parquet file, in memory at a time
_FETCHED = 128  # images of a remote folder, in memory at a time
_WAITS_S = (1, 2, 4, 8, 0)  # after each try of what a network fails to give


def open_source(spec: str | Path, progress: Progress, scratch: Path) -> Source:
    """What `spec` names: a path, `torchvision:NAME[:SPLIT]` or a URL. Paths and URLs may hold `*` and `{000..012}`.

    progress(done, total) while it is indexed, or copied to the folder `scratch`; what is complete there is used again.
    ValueError where there is nothing to read or a package is missing, OSError where a disk or network fails.
    """
    text, path = str(spec), Path(spec)
    scratch.mkdir(parents=True, exist_ok=True)
    if text.startswith("torchvision:"):
        return _torchvision(text, progress, scratch)
    if re.search(r"://|\*|\{\d+\.\.\d+\}", text) and not path.exists():
        return _remote(text, progress, scratch)
    shallow = (
        path.glob(pattern) for pattern in ("*.parquet", "data/*.parquet")
    )  # it may be a million images
    if (path.suffix == ".parquet" and path.is_file()) or any(map(any, shallow)):
        return _parquet(path, progress, scratch)
    if format := find_format(path):
        return Records(FORMATS[format].open(path, progress))
    if path.is_dir():
        root, test = find_splits(path)
        if test:
            raise ValueError(f"{path} holds {root.name}/ and {test.name}/: convert each by itself")
        unreadable: dict[str, str] = {}
        paths = sorted(walk_images(root, unreadable))
        if paths:
            return Files(root, paths, *_by_folder(paths), unreadable)
        if any(path.rglob("*.parquet")):
            return _parquet(path, progress, scratch)
    found = (
        "holds no image"
        if path.is_dir()
        else "is no image data"
        if path.exists()
        else "is not there"
    )
    raise ValueError(
        f"{spec} {found}: looked for {', '.join(SUFFIXES)}, .parquet and {', '.join(FORMATS)}"
    )


def _by_folder(paths: list[str]) -> tuple[list[str], NDArray[np.int32]]:
    """Classes and labels by the first level of folders."""
    numbers = {name: number for number, name in enumerate(class_folders(paths))}
    return list(numbers), np.array(
        [numbers.get(path.partition("/")[0], -1) for path in paths], dtype=np.int32
    )


# ── what is copied to it ─────────────────────────────────────────────────────────────────────────────────────────────


def _parquet(path: Path, progress: Progress, scratch: Path) -> Source:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    names = [file.name if file == path else str(file.relative_to(path)) for file in files]
    _check_splits(str(path), names)
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    return _spool_rows(
        zip(names, files, strict=True), f"{path.absolute()}\n{names} {stats}", progress, scratch
    )


def _check_splits(where: str, names: list[str]) -> None:
    """ValueError where the files are, by their names or folders, of several splits."""
    words = "|".join((*TRAIN, *TEST))
    found = (
        re.search(rf"(^|/)({words}|\w+(?=-\d+-of-))(?![a-z])", name, re.IGNORECASE)
        for name in names
    )
    splits = {match[2]: match.string[: match.end() + 1] for match in found if match}
    if len(splits) > 1:
        raise ValueError(
            f"{where} holds the splits {', '.join(splits)}: name one, '{where}/{min(splits.values())}*'"
        )


def _spool_rows(
    files: Iterable[tuple[str, Path]], identity: str, progress: Progress, scratch: Path
) -> Source:
    classes: list[str] = []
    rows = (row for name, file in files for row in _rows(name, file, classes))
    return spool(rows, classes, scratch, identity, progress)


def _rows(name: str, file: Path, classes: list[str]) -> Iterator[Item]:
    """The rows of a parquet file as Hugging Face writes them, a few in memory at a time; its class names: `classes`."""
    arrow, parquet, row = _needed("pyarrow"), _needed("pyarrow.parquet"), 0
    try:
        # Without `pre_buffer=False`, the whole file stays in memory.
        opened = parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
        image, label, names = _columns(name, opened.schema_arrow)
        if classes and names != classes:
            raise ValueError(
                f"{name} names other classes than the files before it: convert it by itself"
            )
        classes[:] = names
        for batch in opened.iter_batches(_ROWS, columns=[image, label] if label else [image]):
            labels = batch.column(label).to_pylist() if label else [None] * len(batch)
            for cell, number in zip(batch.column(image).to_pylist(), labels, strict=True):
                data, path = (
                    (cell.get("bytes"), cell.get("path"))
                    if isinstance(cell, dict)
                    else (cell, None)
                )
                yield (
                    path or f"{name}, row {row}",
                    data or "the row holds no image",
                    None if number == -1 else number,
                )
                row += 1
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{name} cannot be read from row {row} on ({str(error).strip()}): fetch it again"
        ) from error


def _columns(name: str, schema: Any) -> tuple[str, str | None, list[str]]:
    """The columns of images and of labels, and the names of the classes; None and [] where there are none."""

    def first(columns: Iterable[str], kinds: str) -> str | None:
        return next(
            (
                c
                for c in columns
                if c in schema.names and re.match(kinds, str(schema.field(c).type))
            ),
            None,
        )

    structs, plain = r"struct<.*\bbytes: (large_)?binary", r"(large_)?binary$"
    image = first(_IMAGES, f"{structs}|{plain}") or first(schema.names, structs)
    if image is None:
        raise ValueError(
            f"{name} has no column of images, such as {_IMAGES[0]}: it has {', '.join(schema.names)}"
        )
    features = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        .get("info", {})
        .get("features", {})
    )
    named = [column for column, feature in features.items() if feature.get("_type") == "ClassLabel"]
    label = first((*_LABELS, *named), r"u?int\d+$|(large_)?string$|dictionary<values=string")
    return image, label, features.get(label, {}).get("names", [])


def _torchvision(spec: str, progress: Progress, scratch: Path) -> Source:
    """A data set that torchvision can download: the files that it consists of, or else its images as PNG."""
    import torchvision
    from torchvision import datasets

    (_, name, *split), root = spec.split(":"), cache_folder() / "torchvision"
    kind: Any = getattr(datasets, name) if name in datasets.__all__ else None
    takes = inspect.signature(kind).parameters if kind else {}
    if "root" not in takes or not takes.keys() & {"download", "kwargs"}:
        like = (
            ", ".join(difflib.get_close_matches(name, datasets.__all__))
            or "CIFAR10, STL10 or Imagenette"
        )
        raise ValueError(
            f"{spec}: torchvision has no {name!r} that it can download; it has, say, {like}"
        )
    options: dict[str, Any] = {"split": ":".join(split)} if split else {}
    if split and "train" in takes:
        if split not in (["train"], ["test"]):
            raise ValueError(f"{spec}: {name} has the splits train and test")
        options = {"train": split == ["train"]}
    try:
        root.mkdir(parents=True, exist_ok=True)
        data = kind(root=root, download=True, **options)
    except (OSError, RuntimeError, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{spec} is not to be had ({reason}): or put its files into {root} by hand"
        ) from error
    classes = [
        text if isinstance(text, str) else ", ".join(text) for text in getattr(data, "classes", [])
    ]
    files = getattr(data, "samples", None) or getattr(data, "_samples", [])
    if hasattr(data, "_labels"):
        files = [
            *zip(getattr(data, "_image_files", None) or data._images, data._labels, strict=True)
        ]
    if files and all(str(file).lower().endswith(SUFFIXES) for file, _ in files):
        labels = np.array([-1 if label is None else label for _, label in files], dtype=np.int32)
        paths = [os.path.relpath(file, root) for file, _ in files]
        return Files(root, paths, classes or class_names(labels), labels, {})
    items = (_png(f"{spec}, image {i}", *data[i][:2]) for i in range(len(data)))
    return spool(items, classes, scratch, f"{spec}\n{torchvision.__version__}", progress, len(data))


def _png(name: str, image: Any, label: Any) -> Item:
    encoded = io.BytesIO()
    (image if image.mode in ("L", "RGB") else image.convert("RGB")).save(encoded, "PNG")
    return (
        name,
        encoded.getvalue(),
        int(label) if isinstance(label, int | np.integer) and label >= 0 else None,
    )


# ── URLs and patterns ────────────────────────────────────────────────────────────────────────────────────────────────


def _remote(spec: str, progress: Progress, scratch: Path) -> Source:
    """Images are spooled; parquet files are fetched and spooled one by one; the other kinds are fetched and opened."""
    try:
        opened = [_needed("fsspec").core.url_to_fs(url) for url in _numbered(spec)]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{spec} cannot be opened: {error}") from error
    paths = [
        hit
        for fs, path in opened
        for hit in (sorted(_patiently(fs.glob, path)) if "*" in path else [path])
    ]
    if not paths:
        raise ValueError(f"{spec} matches no file")
    fs, root = opened[0][0], os.path.dirname(os.path.commonprefix(paths))  # noqa: RUF071, commonpath breaks URLs
    folder = len(paths) == 1 and not _kind(paths[0])
    if folder:
        root = paths[0].rstrip("/")
        if "file" in fs.protocol:
            return open_source(root, progress, scratch)
        found = sorted(_patiently(fs.find, root))
        paths = [
            p for p in found if _kind(p) == ".parquet" or (_kind(p) and os.path.dirname(p) == root)
        ]
        paths = paths or [path for path in found if not _kind(path)]
    if len(kinds := {_kind(path) for path in paths}) > 1:
        raise ValueError(f"{spec}: name one folder, or files of one kind")
    names = [
        unquote(path[len(root) + 1 :]) if "http" in fs.protocol else path[len(root) + 1 :]
        for path in paths
    ]
    identity = f"{spec}\n{digest(join_names(paths))}"
    if kinds <= {None}:
        return _remote_images(
            spec, fs, dict(zip(names, paths, strict=True)), identity, progress, scratch
        )
    (kind,), target = kinds, scratch / f"fetched-{digest(join_names(paths))}"
    if kind == ".parquet":
        _check_splits(spec, names)
        copies = (_fetched(fs, path, scratch / "fetched.parquet") for path in paths)
        source = _spool_rows(zip(names, copies, strict=True), identity, progress, scratch)
        (scratch / "fetched.parquet").unlink(missing_ok=True)
        return source
    target.mkdir(exist_ok=True)
    for number, path in enumerate(
        paths
    ):  # numbered: nothing that a server says becomes a path here
        if not (copy := target / f"{number:06d}{kind}").exists():
            _fetched(fs, path, copy)
        progress(number + 1, len(paths))
    beside, target = (root, target) if folder or len(paths) > 1 else (paths[0], copy)
    with suppress(
        FileNotFoundError
    ):  # what convert.py wrote about the data: the names of their classes
        _fetched(fs, f"{beside}.json", target.with_name(f"{target.name}.json"))
    return open_source(target, progress, scratch)


def _remote_images(
    spec: str, fs: Any, paths: dict[str, str], identity: str, progress: Progress, scratch: Path
) -> Source:
    names = [name for name in paths if name.lower().endswith(SUFFIXES) and "/." not in f"/{name}"]
    first = {name.partition("/")[0].lower() for name in names}
    if first & {*TRAIN} and first & {*TEST}:
        raise ValueError(f"{spec} holds {' and '.join(sorted(first))}: convert each by itself")

    def fetch(name: str) -> bytes | str:
        try:
            return _patiently(fs.cat_file, paths[name])
        except FileNotFoundError as error:
            return str(error)

    classes, labels = _by_folder(names)
    parts = (
        names[at : at + _FETCHED] for at in range(0, len(names), _FETCHED)
    )  # at once, `map` would hold them all
    pool = ThreadPoolExecutor(32)
    try:
        images = (image for part in parts for image in pool.map(fetch, part))
        items = zip(
            names, images, (None if label < 0 else label for label in labels.tolist()), strict=True
        )
        return spool(items, classes, scratch, identity, progress, len(names))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fetched(fs: Any, path: str, to: Path) -> Path:
    """`to`, now a copy of the file at `path`; a link to it where that is on this machine."""
    part = to.with_name(f"{to.name}.part")
    part.unlink(missing_ok=True)
    if "file" in fs.protocol:
        part.symlink_to(Path(path).resolve(strict=True))
    else:
        _patiently(fs.get_file, path, str(part))
    return part.replace(to)


def _patiently(ask: Callable[..., Any], path: str, *rest: str) -> Any:
    """What a file system gives, after some tries. FileNotFoundError where it says no, OSError where it fails."""
    for wait_s in _WAITS_S:
        try:
            return ask(path, *rest)
        except Exception as error:  # those of the libraries below fsspec have nothing in common
            if isinstance(error, FileNotFoundError | PermissionError) or getattr(
                error, "status", 0
            ) in (401, 403, 410):
                raise FileNotFoundError(
                    f"{path} is not there, or not for everyone ({error})"
                ) from error
            if not wait_s or getattr(error, "errno", 0) == errno.ENOSPC:
                raise OSError(
                    f"{path} cannot be fetched: {error or type(error).__name__}"
                ) from error
        time.sleep(wait_s)
    raise AssertionError


def _kind(path: str) -> str | None:
    """The suffix that says what a file is; TFRecords are often numbered behind it."""
    kinds = "|".join(
        re.escape(suffix)
        for suffix in (".parquet", *(format.SUFFIX for format in FORMATS.values()))
    )
    found = re.search(rf"({kinds})(-\d+-of-\d+)?$", urlsplit(path).path)
    return found and found[1]


def _numbered(spec: str) -> list[str]:
    """`a-{00..12}.tar` as a-00.tar ... a-12.tar."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not braces:
        return [spec]
    first, last = braces.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [one for number in numbers for one in _numbered(spec.replace(braces[0], number, 1))]


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{module.partition('.')[0]} is missing: uv sync --extra convert"
        ) from error
