"""The embedded demo data set: ten drawn patterns, so that a first run needs no download.

Self-supervision learns whatever two crops of one image share, and the easiest of it first. Were each image to have its
own colours, the network would learn colours and nothing else. So everything but the pattern is either common to all
images, varies inside each of them, or is what the distortions destroy anyway:

- one palette, whose colours change from motif to motif;
- a conformal bend, which turns and scales the motifs from place to place but keeps their shape;
- counterchange: ink and paper swap sides from one motif to the next, so that pixels say little (kNN on them: 22%);
- every class covers the same share of the paper with edges of about the same length, and exposure differs from image to
  image, so that colours say little too (19%).

The pattern itself shows in any crop of 8% of the area. What was tried on the way is in bench/NOTES.md.

Nothing here imports torch or the package: the file runs as a script in the workers that draw.
"""

import io
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Plane = np.ndarray  # float32 [height, width]

VERSION = 2  # part of the folder's name: raise it with every change to the pixels
SEED = 0
SPLITS = {"train": range(4000), "test": range(4000, 5000)}  # samples; the label is sample % 10
LEFTOVER_AGE_S = 3600.0  # a temporary folder untouched for so long belongs to a run that died

INK = np.array(
    [[22, 44, 92], [10, 92, 104], [112, 28, 84], [150, 40, 44], [46, 84, 40], [84, 54, 130]],
    np.float32,
)
PAPER = np.array(
    [
        [250, 236, 206],
        [252, 208, 186],
        [204, 234, 214],
        [190, 222, 246],
        [246, 214, 232],
        [248, 232, 150],
    ],
    np.float32,
)


# Patterns. Each takes coordinates in motif periods and returns the signed distance to the outline, in periods: ink > 0.


def _wrap(t: Plane) -> Plane:
    return t - np.rint(t)


def _staggered(u: Plane, v: Plane, row_height: float) -> tuple[Plane, Plane]:
    """Offsets to the centre of the own cell, in rows of which every other one is shifted by half a period."""
    row = np.rint(v / row_height)
    return _wrap(u + 0.5 * (row % 2)), v - row_height * row


def _lattice(*waves: Plane) -> Plane:
    """Faces between families of straight lines, coloured by turns; `waves` change sign on the lines."""
    sign = np.sign(math.prod(waves[1:], start=waves[0]))
    return sign * np.minimum.reduce([abs(wave) for wave in waves])


def _stripes(u: Plane, v: Plane) -> Plane:
    return (0.215 - abs(_wrap(1.4 * u))) / 1.4


def _checks(u: Plane, v: Plane) -> Plane:
    return _lattice(0.25 - abs(_wrap(0.75 * u)), 0.25 - abs(_wrap(0.75 * v))) / 0.75 - 0.02


def _dots(u: Plane, v: Plane) -> Plane:
    return (0.345 - np.hypot(*_staggered(1.4 * u, 1.4 * v, 0.866))) / 1.4


def _rings(u: Plane, v: Plane) -> Plane:
    return (0.093 - abs(np.hypot(*_staggered(0.8 * u, 0.8 * v, 0.866)) - 0.32)) / 0.8


def _zigzag(u: Plane, v: Plane) -> Plane:
    return (0.215 - abs(_wrap(1.4 * u + abs(_wrap(v))))) / 1.3


def _bricks(u: Plane, v: Plane) -> Plane:
    x, y = _staggered(0.85 * u, v, 0.55)
    return np.minimum(0.46 - abs(x) / 0.85, 0.147 - abs(y))


def _waves(u: Plane, v: Plane) -> Plane:
    return (0.22 - abs(_wrap(1.3 * v + 0.3 * np.sin(4.4 * u)))) / 1.6


def _diamonds(u: Plane, v: Plane) -> Plane:
    a, b = 0.85 * u + 0.37 * v, 0.85 * u - 0.37 * v
    return _lattice(0.25 - abs(_wrap(a)), 0.25 - abs(_wrap(b))) / 0.92 - 0.03


def _scales(u: Plane, v: Plane) -> Plane:
    """Rows of overlapping discs with two rims each; the row with the largest v lies on top."""
    u, v = 0.5 * u, 0.5 * v
    own_row = np.floor(2 * v)
    distance = np.zeros_like(u)
    for row in (own_row - 1, own_row, own_row + 1):
        radius = np.hypot(_wrap(u + 0.5 * (row % 2)), 0.8 * (v - 0.5 * row))
        rims = 0.052 - np.minimum(abs(radius - 0.46), abs(radius - 0.22))
        distance = np.where(radius < 0.52, rims, distance)
    return distance / 0.5


def _honeycomb(u: Plane, v: Plane) -> Plane:
    x, y = map(abs, _staggered(u, v, 0.866))
    return np.maximum(x, 0.5 * x + 0.866 * y) - 0.375


PATTERNS = (
    _stripes,
    _checks,
    _dots,
    _rings,
    _zigzag,
    _bricks,
    _waves,
    _diamonds,
    _scales,
    _honeycomb,
)
CLASSES: tuple[str, ...] = tuple(pattern.__name__.lstrip("_") for pattern in PATTERNS)


def _field(rng: np.random.Generator, cells: int, width: int, height: int) -> Plane:
    """Smooth noise, about 0 to 1, with `cells` random values a side."""
    noise = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


def _paint(rng: np.random.Generator, palette: np.ndarray, width: int, height: int) -> np.ndarray:
    """Colours [height, width, 3] that run through the whole palette every few motifs."""
    steps = np.linspace(0, len(palette) - 1, 256)
    ramp = np.stack(
        [np.interp(steps, np.arange(len(palette)), channel) for channel in palette.T], axis=1
    )
    shade = np.clip(1.2 * _field(rng, 10, width, height) - 0.1, 0, 1)
    return ramp.astype(np.float32)[(255 * shade).astype(np.int32)]


def draw(seed: int, sample: int) -> tuple[bytes, int]:
    """The JPEG of one sample and its label, `sample % 10`. A pure function of its arguments."""
    rng = np.random.default_rng((seed, sample))
    label = sample % len(CLASSES)
    side = rng.uniform(84, 140)  # px, the root of the area
    aspect = 1.0 if rng.random() < 0.15 else math.exp(rng.uniform(-0.35, 0.35))
    width = min(max(round(side * math.sqrt(aspect)), 72), 160)
    height = min(max(round(side / math.sqrt(aspect)), 72), 160)
    side = math.sqrt(width * height)

    # The bend log(1 + bend z) / bend is conformal: it turns and scales a motif by its place but keeps its shape.
    x = (np.arange(width, dtype=np.float32) - width / 2) / side
    y = (np.arange(height, dtype=np.float32) - height / 2) / side
    z = x + 1j * y[:, None]  # [height, width]
    bend = rng.uniform(0.4, 0.8) * np.exp(1j * rng.uniform(0, 2 * math.pi))
    turn = np.exp(1j * rng.uniform(-0.35, 0.35))
    periods = rng.uniform(5.0, 6.0)  # motifs along a side
    opening = (1 + bend * z).astype(np.complex64)
    w = np.log(opening) * np.complex64(periods * turn / bend)
    u = w.real + rng.uniform(0, 100) + 0.1 * _field(rng, 4, width, height)
    v = w.imag + rng.uniform(0, 100) + 0.1 * _field(rng, 4, width, height)

    # Distance in pixels, clipped to one, is the ink's share of a pixel: anti-aliased without oversampling.
    thickness = 0.03 * (_field(rng, 4, width, height) - 0.5)
    distance_px = (PATTERNS[label](u, v) + thickness) * abs(opening) * (side / periods)
    ink = np.clip(distance_px + 0.5, 0, 1)
    swapped = np.clip(60 * (_field(rng, 11, width, height) - 0.5) + 0.5, 0, 1)
    ink = (ink + swapped - 2 * ink * swapped)[..., None]
    pixels = (1 - ink) * _paint(rng, PAPER, width, height) + ink * _paint(rng, INK, width, height)
    pixels *= (0.85 + 0.15 * _field(rng, 3, width, height))[..., None]  # light and shade
    pixels = 255 * (pixels.clip(0, 255) / 255) ** rng.uniform(0.75, 1.35)  # exposure
    pixels += rng.uniform(3, 5) * rng.standard_normal((height, width, 1), np.float32)

    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 1 / 12:
        image = image.convert("L")
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=int(rng.integers(78, 93)))
    return encoded.getvalue(), label


def demo_folder(
    cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """`<cache>/demo-<version>/`, with `train/<class>/00000.jpg` ... and `test/<class>/...`.

    Drawn on first use (5,000 files, 40 MB), then only returned. `progress(images done, images in all)` is
    called from the calling thread. Of several processes that call this at once, the first to finish wins.
    Raises OSError where `cache` cannot be written or a worker dies.
    """
    return drawn_once(cache / f"demo-{VERSION}", lambda folder: _draw_all(folder, progress))


def drawn_once(folder: Path, draw_all: Callable[[Path], None]) -> Path:
    """`folder`, which is filled by `draw_all` aside, and so is whole or not there."""
    cache = folder.parent
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    for leftover in cache.glob(f".{folder.name}-*"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        draw_all(aside)
        aside.chmod(0o755)  # mkdtemp makes it private
        try:
            os.replace(aside, folder)
        except OSError:
            if not folder.is_dir():  # not merely overtaken by another process
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _draw_all(folder: Path, progress: Callable[[int, int], None]) -> None:
    """Draws with one process a core. They run this file alone: no fork of a threaded parent, no import of torch."""
    for split, name in itertools.product(SPLITS, CLASSES):
        (folder / split / name).mkdir(parents=True)
    total = sum(map(len, SPLITS.values()))
    workers = min(os.cpu_count() or 1, 16)
    read_end, write_end = (
        os.pipe()
    )  # a worker writes one byte an image; the pipe ends when the last worker does
    command = [sys.executable, __file__, str(folder), str(workers)]
    processes = [
        subprocess.Popen([*command, str(first)], stdout=write_end) for first in range(workers)
    ]
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            done = 0
            while written := pipe.read(4096):
                done += len(written)
                progress(done, total)
    finally:  # after an exception the pipe is closed, and the workers stop at their next image
        statuses = [process.wait() for process in processes]
    if any(statuses):
        raise OSError(f"{folder}: the demo data set could not be drawn; the reason stands above")


def _draw_share(folder: Path, workers: int, first: int) -> None:
    for split, samples in SPLITS.items():
        for position in range(first, len(samples), workers):
            encoded, label = draw(SEED, samples[position])
            name = f"{position // len(CLASSES):05d}.jpg"
            (folder / split / CLASSES[label] / name).write_bytes(encoded)
            os.write(sys.stdout.fileno(), b".")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    try:
        _draw_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except BrokenPipeError:  # the parent has given up
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{error.filename or 'drawing'}: {error.strerror}")
