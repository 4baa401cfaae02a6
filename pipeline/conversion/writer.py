"""Converts a data set to one of FORMATS: in a seeded global shuffle, and resumable after a kill.

A conversion follows a plan (`plan.py`), from which every byte follows. Its work in progress lies in
`<target>.partial` (`work_folder.py`), where each shard grows beside a journal of what is in it
(`resumable_shard.py`, `journal.py`). At the end all is moved into place.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, as_completed
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..atomic_write import atomic_write
from ..formats import FORMATS
from ..formats.index import index_path, read_description, save_index
from ..formats.scanning import Label
from ..machine import single_threaded_workers, usable_cores
from ..stores import Progress, no_progress
from .journal import REJECTED, ConversionProgress, index_rows, read_journal
from .options import ConversionOptions
from .plan import Plan, describe_differences, make_plan
from .resumable_shard import ShardTask, reject_line, write_shard
from .source_types import Source
from .sources import open_source
from .staging import stage_images
from .work_folder import WorkFolder

_LIBRARIES = ("numpy", "pillow", "simplejpeg", "torch")  # decide the bytes of re-encoded images

OnProgress = Callable[[ConversionProgress, int], None]  # what is done, images in all


class ConversionResult(NamedTuple):
    """What a conversion has written."""

    path: Path
    images: int
    rejects: int
    treatments: dict[str, int]  # what was done to the images -> to how many of them
    bytes: int
    new: bool  # False if the same conversion had been done before


def write_store(
    source: str | Path | Iterable[tuple[bytes, Label]],
    target: str | Path,
    options: ConversionOptions = ConversionOptions(),  # noqa: B008  # immutable
    *,
    executor: Executor | None = None,
    progress: OnProgress = lambda done, images: None,
    listing: Progress = no_progress,
) -> ConversionResult:
    """Convert `source` to `target` (.beton, or a folder of shards), which appears when complete.

    The same call resumes a conversion that was killed.

    Example: `write_store("photos", "photos.beton", ConversionOptions(max_side=400))`.

    Args:
        source: What `open_source` reads, or encoded images with labels: numbers, names of classes,
            or None.
        target: Where to write.
        options: How to write it.
        executor: Writes the shards in processes that share a file system with this one, can
            import this module, and can open `source` by its name.
        progress: Called with what is done, and the number of images in all.
        listing: Called with (done, total) while the source is indexed or copied.

    Raises:
        ValueError: `target` holds something else, another process is writing it, or no image of
            `source` can be used.
        OSError: A disk or network fails.
    """
    target = Path(os.path.abspath(target))
    format = _choose_format(options.format, target)
    location = _locate(source)
    if executor:
        _check_executor_can_write(format, location)
    _check_target_is_not_source(target, location)
    recorded = _read_recorded_plan(target)

    folder = WorkFolder(target.with_name(target.name + ".partial"))
    with folder.claim():
        if isinstance(source, (str, Path)):
            opened = open_source(location, listing, folder.staging)
        else:
            opened = stage_images(source, [], folder.staging)
        plan = make_plan(location, opened, format, options)
        if os.path.lexists(target):  # also if it is a link that leads nowhere
            _check_same_conversion(target, recorded, plan, folder)
            return _read_result(target, new=False)
        _check_source(source, opened, options.strict)

        folder.follow(plan)
        tasks = [
            ShardTask(plan, shard, name, folder, options.strict)
            for shard, name in enumerate(plan.file_names(target))
        ]
        if executor:
            _write_in_executor(tasks, executor, progress)
        else:
            _write_in_threads(tasks, opened, options.threads or usable_cores(), progress)
        _publish(plan, opened, folder, target)
        return _read_result(target, new=True)


def _choose_format(name: str | None, target: Path) -> str:
    """The format by its name, or by the suffix of the target."""
    if name is None:
        by_suffix = {format.SUFFIX: name for name, format in FORMATS.items()}
        name = by_suffix.get(target.suffix)
    if name not in FORMATS:
        raise ValueError(
            f"the format of {target.name} is not known from its name: "
            f"choose one of {', '.join(FORMATS)} (--format)"
        )
    format = FORMATS[name]
    if not format.SHARDED and target.suffix != format.SUFFIX:
        raise ValueError(
            f"{target.name} will be one file of the format {name}: "
            f"call it {target.name}{format.SUFFIX}"
        )
    return name


def _locate(source: Any) -> str:
    """A path or URL with which a process in another folder finds the source; "" for an iterable."""
    if not isinstance(source, (str, Path)):
        return ""
    is_url = re.match(r"[\w+]{2,}:", str(source))
    return str(source) if is_url else os.path.abspath(source)


def _check_executor_can_write(format: str, location: str) -> None:
    if not (FORMATS[format].SHARDED and location):
        raise ValueError(
            "--scheduler can only write webdataset or tfrecord, "
            "from a path or URL that all workers can read"
        )


def _check_target_is_not_source(target: Path, location: str) -> None:
    if location and os.path.realpath(location) == os.path.realpath(target):
        raise ValueError(f"{target} is the source: choose another target")


def _read_recorded_plan(target: Path) -> Mapping[str, Any]:
    """The plan of an earlier conversion to `target`; {} if there is nothing.

    Raises:
        ValueError: There is something else, such as annotations in `<target>.json`.
    """
    recorded = read_description(target).get("plan")
    if isinstance(recorded, dict):
        return recorded
    for path in (target, target.with_name(target.name + ".json")):
        if path.exists():
            raise ValueError(
                f"{path} already exists, and was not made by convert.py: move it, "
                f"or choose another target"
            )
    return {}


def _check_same_conversion(
    target: Path, recorded: Mapping[str, Any], plan: Plan, folder: WorkFolder
) -> None:
    """Raise ValueError unless the target was made with this plan. Removes needless work folders."""
    differences = describe_differences(recorded, plan)
    is_unfinished = bool(differences) and folder.has_plan()  # a conversion that may be resumed
    if not is_unfinished:
        folder.remove()
    if differences:
        raise ValueError(
            f"{target} already exists, and was made from another source or with other options "
            f"({differences}): delete it, or choose another target"
        )


def _check_source(name: object, source: Source, strict: bool) -> None:
    """Raise ValueError if the source is empty, or has a reject although none is allowed."""
    if not len(source):
        raise ValueError(f"{name} holds no image")
    if strict and source.rejects:
        reject, reason = next(iter(source.rejects.items()))
        raise ValueError(f"{reject}: {reason}")


def _write_in_threads(
    tasks: list[ShardTask], source: Source, threads: int, progress: OnProgress
) -> None:
    """Write one shard after the other; threads prepare the images."""
    total = ConversionProgress()

    def add(more: ConversionProgress) -> None:
        nonlocal total
        total = total.plus(more)
        progress(total, len(source))

    pool = single_threaded_workers(threads, "convert")
    try:
        for task in tasks:
            write_shard(task, source, pool, 2 * threads + 1, add)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_in_executor(tasks: list[ShardTask], executor: Executor, progress: OnProgress) -> None:
    """Write the shards as tasks of an executor."""
    total = ConversionProgress()
    futures = [executor.submit(write_shard_remotely, task) for task in tasks]
    try:
        for future in as_completed(futures):
            total = total.plus(future.result())
            progress(total, tasks[0].plan.images)
    finally:
        for future in futures:
            future.cancel()


def write_shard_remotely(task: ShardTask) -> ConversionProgress:
    """Write one shard in whatever process this is; return how much that was."""
    plan = task.plan
    source = _open_remotely(plan.source, task.folder.staging, plan.identity)
    total = ConversionProgress()

    def add(more: ConversionProgress) -> None:
        nonlocal total
        total = total.plus(more)

    pool = single_threaded_workers(1, "convert")
    try:
        write_shard(task, source, pool, 3, add)
    finally:
        pool.shutdown(cancel_futures=True)
    return total


@lru_cache(1)
def _open_remotely(location: str, staging: Path, identity: str) -> Source:
    source = open_source(location, no_progress, staging)
    if source.identity != identity:
        raise ValueError(
            f"{location} has different contents on this worker: mount the same data on all machines"
        )
    return source


def _publish(plan: Plan, source: Source, folder: WorkFolder, target: Path) -> None:
    """Write the index, the description and the rejects beside the target, then move it in place."""
    shards = [folder.shard_files(name) for name in plan.file_names(target)]
    files = [shard.finished for shard in shards]
    journal = np.concatenate([read_journal(shard.journal) for shard in shards])
    rows = index_rows(journal)
    reject_lines = [reject_line(None, name, reason) for name, reason in source.rejects.items()]
    reject_lines += [shard.rejects.read_bytes() for shard in shards]
    rejects = b"".join(reject_lines)
    if not len(rows):
        folder.remove()
        first = json.loads(rejects.splitlines()[0])
        raise ValueError(
            f"none of the {plan.images} images can be used; "
            f"the first, {first['name']}: {first['reason']}"
        )

    rejects_path = target.with_name(target.name + ".rejects.jsonl")
    rejects_path.unlink(missing_ok=True)
    if rejects:
        with atomic_write(rejects_path) as file:
            file.write(rejects)

    # Written in the work folder, so that a kill leaves nothing of it elsewhere.
    save_index(folder.index, files, rows)
    os.replace(folder.index, index_path(target))

    description = _describe(plan, source, journal, files)
    with atomic_write(target.with_name(target.name + ".json")) as file:
        file.write(json.dumps(description, indent=1).encode() + b"\n")

    os.replace(folder.data if FORMATS[plan.format].SHARDED else files[0], target)
    folder.remove()


def _describe(
    plan: Plan, source: Source, journal: NDArray[Any], files: list[Path]
) -> dict[str, Any]:
    """The contents of `<target>.json`."""
    written = journal[journal["treatment"] != REJECTED]
    treatments = Counter(treatment.decode() for treatment in written["treatment"])
    return {
        "format": plan.format,
        "images": len(written),
        "rejects": plan.images - len(written) + len(source.rejects),
        "done": dict(sorted(treatments.items())),
        "bytes": sum(file.stat().st_size for file in files),
        "files": [file.name for file in files],
        "classes": list(source.classes),
        "plan": asdict(plan),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


def _read_result(target: Path, new: bool) -> ConversionResult:
    description = read_description(target)
    try:
        return ConversionResult(
            path=target,
            images=description["images"],
            rejects=description["rejects"],
            treatments=description["done"],
            bytes=description["bytes"],
            new=new,
        )
    except KeyError as error:
        raise ValueError(
            f"{target}.json is damaged (it lacks {error}): restore it, or convert again"
        ) from error
