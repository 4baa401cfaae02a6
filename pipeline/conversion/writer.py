"""Writes a data set in one of FORMATS: in a seeded global shuffle, checked in passing, and to be continued if killed.

A conversion is a `Plan`, from which every byte follows. Work in progress lies in `<target>.partial`: each file grows
beside a journal of what is in it, which says where to go on; at the end all is moved into place at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..formats import FORMATS
from ..formats.index import index_path, read_description, save_index
from ..machine import single_threaded_workers, usable_cores
from ..stores import Progress
from .shard_writer import (
    REJECTED,
    ConversionProgress,
    Plan,
    index_rows,
    json_line,
    read_journal,
    work_files,
    write_file,
)
from .options import ConversionOptions
from .sources import Source, open_source, spooled

_LIBRARIES = (
    "numpy",
    "pillow",
    "simplejpeg",
    "torch",
)  # that decide the bytes of what is encoded again


class ConversionResult(NamedTuple):
    """What became of a data set."""

    path: Path
    images: int
    rejects: int
    done: dict[str, int]  # what was done to how many images
    bytes: int
    new: bool  # False where the same conversion was there already


def write_store(
    source: str | Path | Iterable[tuple[bytes, int | str | None]],
    target: str | Path,
    options: ConversionOptions = ConversionOptions(),  # noqa: B008
    *,
    executor: Executor | None = None,
    progress: Callable[[ConversionProgress, int], None] = lambda written, images: None,
    listing: Progress = lambda done, total: None,
) -> ConversionResult:
    """Writes `source` to `target` (.beton, or a folder of shards), which appears when it is whole.

    source: what `open_source` reads, or encoded images with labels (numbers, or names of classes). format: one of
    FORMATS, where the suffix of `target` does not say it. shards: how many, or as many as take `shard_size` images
    each. max_side, short_side (pixels), quality and validate: see `as_jpeg`. strict: ValueError at the first bad image,
    instead of leaving it out. executor: writes the shards somewhere else, on a file system that is shared with it; it
    must be able to import this module, and to open `source` by its name. progress(how far, images in all).

    The same call goes on where one was killed. ValueError where `target` holds anything else, where somebody else is
    writing it, or where nothing in `source` can be used.
    """
    target = Path(os.path.abspath(target))
    strict = options.strict
    format = options.format or next(
        (name for name, f in FORMATS.items() if target.suffix == f.SUFFIX), ""
    )
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"{target.name} does not say which format it is to have: choose one of {known} (--format)"
        )
    if not FORMATS[format].SHARDED and target.suffix != FORMATS[format].SUFFIX:
        raise ValueError(
            f"{target.name} is one file of the format {format}: call it {target.name}{FORMATS[format].SUFFIX}"
        )
    if executor and not (FORMATS[format].SHARDED and isinstance(source, (str, Path))):
        raise ValueError(
            "a cluster writes shards, of a source that it can open by itself: webdataset or tfrecord"
        )
    spelled, partial = _spelled(source), target.with_name(target.name + ".partial")
    if spelled and os.path.realpath(spelled) == os.path.realpath(target):
        raise ValueError(f"{target} is the source: name another target")
    told = read_description(target).get("plan")
    for path in (
        target,
        target.with_name(target.name + ".json"),
    ):  # somebody's annotations may be called so
        if path.exists() and not isinstance(told, dict):
            raise ValueError(
                f"{path} is there already, not made by this program: move it, or name another target"
            )
    with _claimed(partial):
        if isinstance(source, (str, Path)):
            opened = open_source(spelled, listing, partial / "spool")
        else:
            opened = spooled(source, [], partial / "spool")
        plan = Plan(
            source=spelled,
            identity=opened.identity,
            images=len(opened),
            format=format,
            shards=max(1, min(options.shards or -(-len(opened) // options.shard_size), len(opened)))
            if FORMATS[format].SHARDED
            else 1,
            seed=options.seed,
            max_side=options.max_side,
            short_side=options.short_side,
            quality=options.quality,
            validate=options.validate,
        )
        if os.path.lexists(target):  # or a link to what is not there
            changes = _differences(told or {}, plan)
            if not (changes and (partial / "plan.json").exists()):
                shutil.rmtree(partial)
            if changes:
                raise ValueError(
                    f"{target} is there already, made otherwise ({changes}): delete it, or name another"
                )
            return _report(target, new=False)
        if not len(opened):
            raise ValueError(f"{source} holds no image")
        for name, why in opened.rejects.items() if strict else ():
            raise ValueError(f"{name}: {why}")
        _settle(plan, partial)
        if executor:
            _write_elsewhere(plan, target, partial, strict, executor, progress)
        else:
            _write_here(
                plan, opened, target, partial, strict, options.threads or usable_cores(), progress
            )
        _put_in_place(plan, opened, target, partial)
        return _report(target, new=True)


# ── all files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_here(
    plan: Plan,
    source: Source,
    target: Path,
    partial: Path,
    strict: bool,
    threads: int,
    progress: Callable[[ConversionProgress, int], None],
) -> None:
    """One file after the other, images in threads."""
    total = ConversionProgress()

    def wrote(more: ConversionProgress) -> None:
        nonlocal total
        total = ConversionProgress(*(a + b for a, b in zip(total, more, strict=True)))
        progress(total, plan.images)

    pool = single_threaded_workers(threads, "convert")
    try:
        for shard, name in enumerate(plan.files(target)):
            write_file(
                plan, source, shard, partial / "data" / name, strict, pool, 2 * threads + 1, wrote
            )
    finally:
        pool.shutdown(cancel_futures=True)


def _write_elsewhere(
    plan: Plan,
    target: Path,
    partial: Path,
    strict: bool,
    executor: Executor,
    progress: Callable[[ConversionProgress, int], None],
) -> None:
    """The files as tasks of an executor."""
    total = ConversionProgress()
    tasks = [
        executor.submit(write_one, plan, shard, str(partial / "data" / name), strict)
        for shard, name in enumerate(plan.files(target))
    ]
    try:
        for task in as_completed(tasks):
            total = ConversionProgress(*(a + b for a, b in zip(total, task.result(), strict=True)))
            progress(total, plan.images)
    finally:
        for task in tasks:
            task.cancel()


def write_one(plan: Plan, shard: int, final: str, strict: bool) -> tuple[int, int, int]:
    """One file of a conversion, in whatever process this is: how much was `ConversionProgress`."""
    source = _source_elsewhere(plan.source, str(Path(final).parent.parent / "spool"), plan.identity)
    counts: list[ConversionProgress] = []
    pool = single_threaded_workers(1, "convert")
    try:
        write_file(plan, source, shard, Path(final), strict, pool, 3, counts.append)
    finally:
        pool.shutdown(cancel_futures=True)
    images, rejects, size = map(sum, zip(*counts, strict=True))
    return images, rejects, size


@lru_cache(1)
def _source_elsewhere(source: str, scratch: str, identity: str) -> Source:
    opened = open_source(source, lambda done, total: None, Path(scratch))
    if opened.identity != identity:
        raise ValueError(
            f"{source} is another data set on this machine: mount the same one on all of them"
        )
    return opened


def _spelled(source: Any) -> str:
    """How a process that works in another folder finds the source; empty for images from Python."""
    if not isinstance(source, (str, Path)):
        return ""
    return str(source) if re.match(r"[\w+]{2,}:", str(source)) else os.path.abspath(source)


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _put_in_place(plan: Plan, source: Source, target: Path, partial: Path) -> None:
    """The index and the account beside the target, then the target itself."""
    files = [partial / "data" / name for name in plan.files(target)]
    journals = [read_journal(work_files(file)[1]) for file in files]
    told = np.concatenate(journals)
    rows = index_rows(told)
    lines = [
        json_line({"source": None, "name": name, "reason": why})
        for name, why in source.rejects.items()
    ]
    lines += [work_files(file)[2].read_bytes() for file in files]
    if not len(rows):
        first = json.loads(b"".join(lines).splitlines()[0])
        shutil.rmtree(partial)
        raise ValueError(
            f"none of the {plan.images} images can be used; the first, {first['name']}: {first['reason']}"
        )
    done = Counter(word.decode() for word in told["done"] if word != REJECTED)
    account = {
        "format": plan.format,
        "images": len(rows),
        "rejects": plan.images - len(rows) + len(source.rejects),
        "done": dict(sorted(done.items())),
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
        "classes": list(source.classes),
        "plan": asdict(plan),
        "versions": {library: version(library) for library in _LIBRARIES},
    }
    rejects_path = target.with_name(target.name + ".rejects.jsonl")
    rejects_path.unlink(missing_ok=True)
    if account["rejects"]:
        _write_whole(rejects_path, b"".join(lines))
    save_index(
        partial / "index.npz", files, rows
    )  # whatever a kill leaves of it goes with the folder
    os.replace(partial / "index.npz", index_path(target))
    _write_whole(
        target.with_name(target.name + ".json"), json.dumps(account, indent=1).encode() + b"\n"
    )
    os.replace(partial / "data" if FORMATS[plan.format].SHARDED else files[0], target)
    shutil.rmtree(partial)


def _report(target: Path, new: bool) -> ConversionResult:
    account = read_description(target)
    try:
        return ConversionResult(
            target, account["images"], account["rejects"], account["done"], account["bytes"], new
        )
    except KeyError as error:
        raise ValueError(
            f"{target}.json is damaged (it lacks {error}): restore it, or convert anew"
        ) from error


def _settle(plan: Plan, partial: Path) -> None:
    """Makes `partial` the working folder of this plan; ValueError where it is that of another one."""
    told = partial / "plan.json"
    try:
        changes = told.exists() and _differences(json.loads(told.read_text()), plan)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{told} is damaged ({error}): delete {partial}, and begin again"
        ) from error
    if changes:
        raise ValueError(
            f"{partial} holds a conversion that was begun otherwise ({changes}): finish it, or delete it"
        )
    (partial / "data").mkdir(exist_ok=True)
    (partial / "journal").mkdir(exist_ok=True)
    _write_whole(told, json.dumps(asdict(plan)).encode())


def _differences(told: dict[str, Any], plan: Plan) -> str:
    """What another plan has instead. Names alone do not tell a data set from its copy of another size."""
    now = asdict(plan)
    other = [(name, told.get(name), now.get(name)) for name in {**now, **told}]
    return ", ".join(
        f"{name} {then} instead of {wanted}" for name, then, wanted in other if then != wanted
    )


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Takes the working folder for this process, and removes it again if nothing came to be in it."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / "lock"
    with open(lock, "w") as file:

        def is_ours() -> bool:  # whoever is done removes it, and the next one makes another
            with suppress(FileNotFoundError):
                return os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            return False

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_ours():
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(
                f"another conversion is writing {partial}: wait for it, or name another target"
            ) from None
        try:
            yield
        except OSError as error:
            error.add_note("once that is set right, the same command goes on")
            raise
        finally:
            if is_ours() and not any(
                path.is_file() and path != lock for path in partial.rglob("*")
            ):
                shutil.rmtree(partial, ignore_errors=True)


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
