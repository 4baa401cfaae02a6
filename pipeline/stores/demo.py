"""The demo data set, drawn on first use so that a first run needs no download.

See `demo_drawing.py` for the images themselves.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from ..atomic_write import create_folder_once
from . import demo_drawing
from .demo_drawing import CLASSES, SPLITS
from .store import Progress, no_progress

VERSION = 2  # part of the folder's name: raise it with every change to the pixels


def demo_folder(cache: Path, progress: Progress = no_progress) -> Path:
    """`<cache>/demo-<version>/`, with `train/<class>/00000.jpg` ... and `test/<class>/...`.

    Drawn on first use (5,000 files, 40 MB). If several processes call this at once, the first to
    finish wins.

    Args:
        cache: Where the folder is kept.
        progress: Called with (images done, images in all), from the calling thread.

    Raises:
        OSError: `cache` cannot be written, or a worker process died.
    """
    return create_folder_once(cache / f"demo-{VERSION}", lambda folder: _draw_all(folder, progress))


def _draw_all(folder: Path, progress: Progress) -> None:
    """Draw all images, with one process per core.

    The processes run the drawing script alone. That avoids forking a parent that has threads, and
    importing torch in each of them.
    """
    for split, name in itertools.product(SPLITS, CLASSES):
        (folder / split / name).mkdir(parents=True)
    total = sum(len(samples) for samples in SPLITS.values())
    workers = min(os.cpu_count() or 1, 16)

    # A worker writes one byte for each image; the pipe ends when the last worker does.
    read_end, write_end = os.pipe()
    command = [sys.executable, demo_drawing.__file__, str(folder), str(workers)]
    processes = [
        subprocess.Popen([*command, str(first)], stdout=write_end) for first in range(workers)
    ]
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            done = 0
            while dots := pipe.read(4096):
                done += len(dots)
                progress(done, total)
    finally:  # after an exception the pipe is closed, and the workers stop at their next image
        statuses = [process.wait() for process in processes]
    if any(statuses):
        raise OSError(
            f"{folder}: the demo data set could not be generated: exit status "
            f"{max(statuses, key=abs)} of a drawing process, which prints its error above"
        )
