"""Drawn JPEGs that cost what photographs do: for a machine without ImageNet, and figures that anyone can reproduce.

What a decoder spends is set by the pixels and the entropy-coded bytes. So these have the statistics of photographs
(1/f amplitudes, channels that go together, surfaces that hide each other, grain), and at 500x375 ImageNet's 97 kB.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Plane = np.ndarray  # float32 [height, width]

VERSION = 1  # raise it with every change to the pixels
_QUALITY = 92


def draw_photos(
    folder: Path,
    count: int,
    *,
    width: int = 500,
    height: int = 375,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """`folder`, with `count` JPEGs drawn into it unless they are there. progress(images done, images in all).

    Replaces photos drawn with other settings, and no other files. OSError where `folder` cannot be written.
    """
    settings = json.dumps(
        {"version": VERSION, "count": count, "width": width, "height": height, "seed": seed}
    )
    marker = folder / "drawn.json"
    if marker.exists() and marker.read_text() == settings:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in (marker, *folder.glob("drawn-*.jpg")):
        old.unlink(missing_ok=True)
    for sample in range(count):
        (folder / f"drawn-{sample:05d}.jpg").write_bytes(photo(seed, sample, width, height))
        progress(sample + 1, count)
    marker.write_text(settings)  # last: without it the folder is unfinished
    return folder


def photo(seed: int, sample: int, width: int, height: int) -> bytes:
    """One JPEG, 4:2:0: a pure function of its arguments."""
    rng = np.random.default_rng((seed, sample))
    colours, roughness = (
        np.asarray(plane, dtype=np.float32) for plane in _surfaces(rng, width, height)
    )
    roughness /= 255  # [height, width]
    relief = _field(rng, width, height) * roughness
    tint = np.stack([_field(rng, width // 4 + 1, height // 4 + 1) for _ in range(3)], axis=-1)
    tint = (
        _enlarged(128 + 36 * tint, width, height) - 128
    )  # colours vary more slowly than light does
    grain = rng.standard_normal((height, width), dtype=np.float32)
    pixels = colours * (1 + 0.25 * relief)[..., None]  # [height, width, 3]
    pixels += tint * (0.3 * roughness)[..., None]
    pixels += (24 * relief + 6.5 * grain)[..., None]
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
        encoded, "JPEG", quality=_QUALITY, subsampling="4:2:0"
    )
    return encoded.getvalue()


def _surfaces(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """Surfaces from far to near, from large to small: their colours (RGB), and how rough each is (L)."""

    def colours_of(count: int) -> np.ndarray:
        """Brightness varies more than hue does, and hues of one scene are related."""
        return (mood + rng.normal(0, 42, (count, 1)) + rng.normal(0, 16, (count, 3))).clip(5, 250)

    mood = rng.uniform(70, 170) + rng.normal(0, 18, 3)
    corner = (
        colours_of(4).reshape(2, 2, 3).astype(np.uint8)
    )  # the background fades between four colours
    colours = Image.fromarray(corner).resize((width, height), Image.Resampling.BILINEAR)
    roughness = Image.new("L", (width, height), int(rng.uniform(20, 200)))
    paint, scratch = ImageDraw.Draw(colours), ImageDraw.Draw(roughness)
    radii = np.sort(0.03 * height * rng.pareto(1.2, 30) + 0.03 * height).clip(max=0.6 * height)[
        ::-1
    ]
    for radius, colour in zip(radii, colours_of(len(radii)).astype(int).tolist(), strict=True):
        corners = int(rng.integers(3, 6)) if rng.random() < 0.6 else 40  # 40: round
        angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
        if corners < 40:
            angle = angle + rng.normal(0, 0.3, corners)
        centre = rng.uniform((0, 0), (width, height))
        outline = centre + radius * np.stack(
            [np.cos(angle) * rng.uniform(0.4, 1.5), np.sin(angle)], axis=1
        )
        points = [(float(x), float(y)) for x, y in outline]
        paint.polygon(points, tuple(colour))
        scratch.polygon(points, int(255 * rng.beta(1.2, 1.5)))
    return colours.filter(
        ImageFilter.SMOOTH
    ), roughness  # no edge in a photograph is sharper than its lens


def _enlarged(plane: Plane, width: int, height: int) -> Plane:
    image = Image.fromarray(plane.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def _field(rng: np.random.Generator, width: int, height: int) -> Plane:
    """Noise whose amplitude falls with 1/frequency; mean 0, deviation 1."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None]).astype(np.float32)
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((2, *frequency.shape), dtype=np.float32)
    field = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, (height, width))
    return field / field.std()
