"""Draws the images of the demo data set: ten patterns, which are its classes.

Self-supervision learns whatever two crops of one image share, and the easiest of it first. If each
image had its own colours, the network would learn colours and nothing else. So everything but the
pattern is common to all images, varies inside each of them, or is destroyed by the distortions:

- One palette for all images, with colours that change from motif to motif.
- A conformal bend, which turns and scales the motifs from place to place but keeps their shape.
- Counterchange: ink and paper swap sides from one motif to the next, so that pixels alone say
  little (kNN on them: 22%).
- Every class covers the same share of the paper, with edges of about the same length, and the
  exposure differs from image to image, so that colours alone say little too (19%).

The pattern itself shows in any crop of 8% of the area. bench/NOTES.md lists other attempts.

This file imports neither torch nor the package, because `demo.py` runs it as a script: each worker
process draws its share of the images.
"""

import io
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

Plane = np.ndarray  # float32 [height, width]

SEED = 0
SPLITS = {"train": range(4000), "test": range(4000, 5000)}  # samples; the label is sample % 10

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


# Patterns. Each takes coordinates (u, v) in motif periods and returns the signed distance to the
# outline of its motif, in periods: positive inside, where the ink is.


def _wrap(t: Plane) -> Plane:
    return t - np.rint(t)


def _staggered(u: Plane, v: Plane, row_height: float) -> tuple[Plane, Plane]:
    """Offsets to the centre of the own cell, where every other row is shifted by half a period."""
    row = np.rint(v / row_height)
    return _wrap(u + 0.5 * (row % 2)), v - row_height * row


def _lattice(*waves: Plane) -> Plane:
    """Faces between families of straight lines, in alternating colours.

    Each of the `waves` changes its sign on the lines of one family.
    """
    sign = np.sign(math.prod(waves[1:], start=waves[0]))
    return sign * np.minimum.reduce([abs(wave) for wave in waves])


def _stripes(u: Plane, v: Plane) -> Plane:
    return (0.215 - abs(_wrap(1.4 * u))) / 1.4


def _checks(u: Plane, v: Plane) -> Plane:
    return _lattice(0.25 - abs(_wrap(0.75 * u)), 0.25 - abs(_wrap(0.75 * v))) / 0.75 - 0.02


def _dots(u: Plane, v: Plane) -> Plane:
    return (0.345 - np.hypot(*_staggered(1.4 * u, 1.4 * v, 0.866))) / 1.4


def _rings(u: Plane, v: Plane) -> Plane:
    radius = np.hypot(*_staggered(0.8 * u, 0.8 * v, 0.866))
    return (0.093 - abs(radius - 0.32)) / 0.8


def _zigzag(u: Plane, v: Plane) -> Plane:
    return (0.215 - abs(_wrap(1.4 * u + abs(_wrap(v))))) / 1.3


def _bricks(u: Plane, v: Plane) -> Plane:
    x, y = _staggered(0.85 * u, v, 0.55)
    return np.minimum(0.46 - abs(x) / 0.85, 0.147 - abs(y))


def _waves(u: Plane, v: Plane) -> Plane:
    return (0.22 - abs(_wrap(1.3 * v + 0.3 * np.sin(4.4 * u)))) / 1.6


def _diamonds(u: Plane, v: Plane) -> Plane:
    a = 0.85 * u + 0.37 * v
    b = 0.85 * u - 0.37 * v
    return _lattice(0.25 - abs(_wrap(a)), 0.25 - abs(_wrap(b))) / 0.92 - 0.03


def _scales(u: Plane, v: Plane) -> Plane:
    """Rows of overlapping discs with two rims each; the row with the largest v lies on top."""
    u = 0.5 * u
    v = 0.5 * v
    own_row = np.floor(2 * v)
    distance = np.zeros_like(u)
    for row in (own_row - 1, own_row, own_row + 1):
        radius = np.hypot(_wrap(u + 0.5 * (row % 2)), 0.8 * (v - 0.5 * row))
        rims = 0.052 - np.minimum(abs(radius - 0.46), abs(radius - 0.22))
        distance = np.where(radius < 0.52, rims, distance)
    return distance / 0.5


def _honeycomb(u: Plane, v: Plane) -> Plane:
    x, y = _staggered(u, v, 0.866)
    x = abs(x)
    y = abs(y)
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


def draw(seed: int, sample: int) -> tuple[bytes, int]:
    """The JPEG of one sample and its label, `sample % 10`. A pure function of its arguments."""
    rng = np.random.default_rng((seed, sample))
    label = sample % len(CLASSES)
    width, height = _choose_size(rng)

    ink = _draw_pattern(rng, label, width, height)[..., None]  # [height, width, 1]
    paper_colour = _paint(rng, PAPER, width, height)
    ink_colour = _paint(rng, INK, width, height)
    pixels = (1 - ink) * paper_colour + ink * ink_colour  # [height, width, 3]
    pixels *= (0.85 + 0.15 * _smooth_noise(rng, 3, width, height))[..., None]  # light and shade
    exposure = rng.uniform(0.75, 1.35)
    pixels = 255 * (pixels.clip(0, 255) / 255) ** exposure
    pixels += rng.uniform(3, 5) * rng.standard_normal((height, width, 1), np.float32)

    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    is_grey = rng.random() < 1 / 12
    if is_grey:
        image = image.convert("L")
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=int(rng.integers(78, 93)))
    return encoded.getvalue(), label


def _choose_size(rng: np.random.Generator) -> tuple[int, int]:
    """A random width and height, 72 to 160 pixels each; one image in seven is a square."""
    side = rng.uniform(84, 140)  # px, the root of the area
    is_square = rng.random() < 0.15
    aspect = 1.0 if is_square else math.exp(rng.uniform(-0.35, 0.35))
    width = min(max(round(side * math.sqrt(aspect)), 72), 160)
    height = min(max(round(side / math.sqrt(aspect)), 72), 160)
    return width, height


def _draw_pattern(rng: np.random.Generator, label: int, width: int, height: int) -> Plane:
    """The share of ink in each pixel, 0 to 1, of a bent and counterchanged pattern."""
    side = math.sqrt(width * height)
    x = (np.arange(width, dtype=np.float32) - width / 2) / side
    y = (np.arange(height, dtype=np.float32) - height / 2) / side
    z = x + 1j * y[:, None]  # [height, width]

    # w = log(1 + bend z) / bend is conformal: it turns and scales a motif by its place in the image
    # but keeps its shape.
    bend = rng.uniform(0.4, 0.8) * np.exp(1j * rng.uniform(0, 2 * math.pi))
    turn = np.exp(1j * rng.uniform(-0.35, 0.35))
    periods = rng.uniform(5.0, 6.0)  # motifs along a side
    opening = (1 + bend * z).astype(np.complex64)
    w = np.log(opening) * np.complex64(periods * turn / bend)
    u = w.real + rng.uniform(0, 100) + 0.1 * _smooth_noise(rng, 4, width, height)
    v = w.imag + rng.uniform(0, 100) + 0.1 * _smooth_noise(rng, 4, width, height)

    # The distance in pixels, clipped to one pixel, is the share of ink: anti-aliased without
    # oversampling.
    thickness = 0.03 * (_smooth_noise(rng, 4, width, height) - 0.5)
    distance_px = (PATTERNS[label](u, v) + thickness) * abs(opening) * (side / periods)
    ink = np.clip(distance_px + 0.5, 0, 1)
    swapped = np.clip(60 * (_smooth_noise(rng, 11, width, height) - 0.5) + 0.5, 0, 1)
    return ink + swapped - 2 * ink * swapped


def _paint(rng: np.random.Generator, palette: np.ndarray, width: int, height: int) -> np.ndarray:
    """Colours [height, width, 3] that run through the whole palette every few motifs."""
    steps = np.linspace(0, len(palette) - 1, 256)
    ramp = np.stack(
        [np.interp(steps, np.arange(len(palette)), channel) for channel in palette.T], axis=1
    )
    shade = np.clip(1.2 * _smooth_noise(rng, 10, width, height) - 0.1, 0, 1)
    return ramp.astype(np.float32)[(255 * shade).astype(np.int32)]


def _smooth_noise(rng: np.random.Generator, cells: int, width: int, height: int) -> Plane:
    """Smooth noise, about 0 to 1, from `cells` x `cells` random values."""
    noise = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))


def draw_share(folder: Path, workers: int, first: int) -> None:
    """Draw every `workers`-th image of each split, from `first` on; print a dot for each."""
    for split, samples in SPLITS.items():
        for position in range(first, len(samples), workers):
            encoded, label = draw(SEED, samples[position])
            name = f"{position // len(CLASSES):05d}.jpg"
            (folder / split / CLASSES[label] / name).write_bytes(encoded)
            os.write(sys.stdout.fileno(), b".")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    folder, workers, first = sys.argv[1:]
    try:
        draw_share(Path(folder), int(workers), int(first))
    except BrokenPipeError:  # the parent has given up
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{error.filename or 'drawing'}: {error.strerror}")


if __name__ == "__main__":
    main()
