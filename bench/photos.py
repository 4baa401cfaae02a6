"""Drawn JPEGs that cost as much as photographs: benchmarks that anyone can reproduce, without data.

The time of a decoder depends on the number of pixels and of entropy-coded bytes. So the drawings
have the statistics of photographs (1/f amplitudes, correlated channels, surfaces that occlude each
other, grain), and at 500 x 375 pixels 96 kB, about as much as ImageNet's images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Plane = np.ndarray  # float32 [height, width]

VERSION = 1  # increase it with every change to the pixels
_QUALITY = 92
_SURFACES = 30
_ELLIPSE_CORNERS = 40


def draw_photos(
    folder: Path,
    count: int,
    *,
    width: int = 500,
    height: int = 375,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Draw JPEGs into a folder unless they are there already.

    Photographs that were drawn with other settings are replaced; other files are kept.

    Args:
        folder: The folder; it is created if needed.
        count: Number of images.
        width: Width of each, pixels.
        height: Height of each, pixels.
        seed: Decides the contents.
        progress: Called with the number of images that are done and the number of all.

    Returns:
        The folder.

    Raises:
        OSError: The folder cannot be written.
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
    """One JPEG with 4:2:0 subsampling, a pure function of its arguments."""
    rng = np.random.default_rng((seed, sample))
    surfaces, surface_roughness = _draw_surfaces(rng, width, height)
    colours = np.asarray(surfaces, dtype=np.float32)  # [height, width, 3]
    roughness = np.asarray(surface_roughness, dtype=np.float32) / 255  # [height, width]
    relief = _noise(rng, width, height) * roughness
    # Colours vary more slowly than light.
    tint = np.stack([_noise(rng, width // 4 + 1, height // 4 + 1) for _ in range(3)], axis=-1)
    tint = _enlarge(128 + 36 * tint, width, height) - 128
    grain = rng.standard_normal((height, width), dtype=np.float32)

    pixels = colours * (1 + 0.25 * relief)[..., None]
    pixels += tint * (0.3 * roughness)[..., None]
    pixels += (24 * relief + 6.5 * grain)[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_QUALITY, subsampling="4:2:0")
    return encoded.getvalue()


def _draw_surfaces(
    rng: np.random.Generator, width: int, height: int
) -> tuple[Image.Image, Image.Image]:
    """Surfaces from far to near and from large to small: their colours (RGB) and roughness (L)."""
    mood = rng.uniform(70, 170) + rng.normal(0, 18, 3)
    # The background is a gradient between four colours.
    corners = _related_colours(rng, mood, 4).reshape(2, 2, 3).astype(np.uint8)
    colours = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    roughness = Image.new("L", (width, height), int(rng.uniform(20, 200)))
    colour_canvas = ImageDraw.Draw(colours)
    roughness_canvas = ImageDraw.Draw(roughness)

    radii = np.sort(0.03 * height * rng.pareto(1.2, _SURFACES) + 0.03 * height)
    radii = radii.clip(max=0.6 * height)[::-1]
    surface_colours = _related_colours(rng, mood, _SURFACES).astype(int).tolist()
    for radius, colour in zip(radii, surface_colours, strict=True):
        outline = _draw_outline(rng, radius, width, height)
        colour_canvas.polygon(outline, tuple(colour))
        roughness_canvas.polygon(outline, int(255 * rng.beta(1.2, 1.5)))
    # No edge in a photograph is sharper than its lens.
    return colours.filter(ImageFilter.SMOOTH), roughness


def _related_colours(rng: np.random.Generator, mood: np.ndarray, count: int) -> np.ndarray:
    """Colours [count, 3] of one scene: brightness varies more than hue."""
    brightness = rng.normal(0, 42, (count, 1))
    hue = rng.normal(0, 16, (count, 3))
    return (mood + brightness + hue).clip(5, 250)


def _draw_outline(
    rng: np.random.Generator, radius: float, width: int, height: int
) -> list[tuple[float, float]]:
    """The corners of a polygon, or of an ellipse, somewhere in the image."""
    is_polygon = rng.random() < 0.6
    corners = int(rng.integers(3, 6)) if is_polygon else _ELLIPSE_CORNERS
    angle = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
    if is_polygon:
        angle = angle + rng.normal(0, 0.3, corners)
    centre = rng.uniform((0, 0), (width, height))
    direction = np.stack([np.cos(angle) * rng.uniform(0.4, 1.5), np.sin(angle)], axis=1)
    outline = centre + radius * direction
    return [(float(x), float(y)) for x, y in outline]


def _enlarge(plane: Plane, width: int, height: int) -> Plane:
    image = Image.fromarray(plane.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def _noise(rng: np.random.Generator, width: int, height: int) -> Plane:
    """Noise with an amplitude that falls with 1/frequency; mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None]).astype(np.float32)
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((2, *frequency.shape), dtype=np.float32)
    field = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency, (height, width))
    return field / field.std()
