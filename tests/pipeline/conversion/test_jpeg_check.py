"""The fast check of JPEGs against libjpeg-turbo: what it takes for intact decodes in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.conversion.jpeg_check import is_intact
from tests.helpers.images import encoded, picture

ROOT = Path(__file__).parents[3]
SIZES = [(1, 1), (7, 9), (8, 8), (16, 16), (17, 15), (33, 16), (40, 31), (90, 64)]
QUALITIES = [5, 30, 60, 75, 85, 92, 97, 100]
MARKERS = [
    b"\xff" + bytes([i])
    for i in (0, 1, 0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE, 0xFF)
]


def ordinary_jpegs() -> dict[str, bytes]:
    """JPEGs of both encoders: grey, RGB, every common subsampling, with and without own tables."""
    jpegs = {}
    for i, ((width, height), quality) in enumerate(zip(SIZES, QUALITIES, strict=True)):
        colour = picture(width, height, seed=i)
        grey = picture(width, height, seed=i, mode="L")
        for optimize in (False, True):
            options = {"quality": quality, "optimize": optimize}
            name = f"{width}x{height} {optimize}"
            jpegs[f"L {name}"] = encoded(grey, **options)
            jpegs[f"rgb {name}"] = encoded(colour, **options, keep_rgb=True)
            jpegs[f"icc {name}"] = encoded(colour, **options, icc_profile=b"p" * 200)
            for subsampling in range(3):
                jpegs[f"{subsampling} {name}"] = encoded(colour, **options, subsampling=subsampling)
        for subsampling in ("444", "422", "420", "440"):
            jpegs[f"turbo {subsampling} {width}"] = simplejpeg.encode_jpeg(
                np.array(colour), quality, "RGB", subsampling
            )
    return jpegs


def unusual_jpegs() -> dict[str, bytes]:
    """JPEGs that libjpeg-turbo decodes, but that the check need not know."""
    jpegs = {}
    for i, (width, height) in enumerate(SIZES):
        colour = picture(width, height, seed=i)
        jpegs[f"progressive {i}"] = encoded(colour, quality=80, progressive=True)
        jpegs[f"restart {i}"] = encoded(colour, quality=80, restart_marker_blocks=2)
        jpegs[f"cmyk {i}"] = encoded(colour.convert("CMYK"), quality=80)
        jpegs[f"411 {i}"] = simplejpeg.encode_jpeg(np.array(colour), 80, "RGB", "411")
        jpegs[f"long icc {i}"] = encoded(colour, quality=80, icc_profile=b"p" * 70_000)
    return jpegs


ORDINARY = ordinary_jpegs()
UNUSUAL = unusual_jpegs()


def damage(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Damage a file in one of many ways.

    Bits are flipped or bytes set, anywhere or near an end; the file is cut off; parts are removed,
    repeated, zeroed or replaced by those of another file.
    """
    changed = bytearray(data)
    size = len(data)
    scan = max(0, data.rfind(b"\xff\xda"))
    at = int(rng.integers(size))
    length = int(rng.integers(1, rng.choice([3, 9, 99])))
    kind = rng.integers(14)
    if kind < 6:
        anywhere, header = (0, size), (0, min(scan + 14, size))
        entropy_coded, end = (scan, size), (max(0, size - 12), size)
        change_bytes(changed, rng, (anywhere, header, entropy_coded, end)[kind % 4])
    elif kind == 6:
        if rng.random() < 0.5:
            at = size - int(rng.integers(1, 9))
        del changed[at:]
    elif kind == 7:
        del changed[at : at + length]
    elif kind == 8:
        changed[at:at] = changed[at : at + length] * int(rng.integers(1, 4))
    elif kind == 9:
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == 10:
        changed[at:] = other[int(rng.integers(len(other))) :]
    elif kind == 11:
        changed[at:at] = MARKERS[rng.integers(len(MARKERS))]
    elif kind == 12:
        changed[at : at + 2] = MARKERS[rng.integers(len(MARKERS))]
    else:
        junk = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        changed[size - 2 : size - int(rng.integers(3))] = junk
    return bytes(changed)


def change_bytes(data: bytearray, rng: np.random.Generator, between: tuple[int, int]) -> None:
    """Flip a bit in up to three bytes, or set them."""
    for i in rng.integers(*between, int(rng.integers(1, 4))):
        if rng.random() < 0.7:
            data[i] ^= 1 << int(rng.integers(8))
        else:
            data[i] = int(rng.integers(256))


def damaged_jpegs(seed: int) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    originals = [*ORDINARY.values(), *UNUSUAL.values()]
    while True:
        data = originals[rng.integers(len(originals))]
        times = 2 if rng.random() < 0.2 else 1
        for _ in range(times):
            data = damage(data, rng, originals[rng.integers(len(originals))]) or b"\xff"
        yield data


def decode_strictly(data: bytes) -> None:
    """Raise ValueError or KeyError if libjpeg-turbo reports an error or a warning."""
    simplejpeg.decode_jpeg_header(data)
    simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def is_refused_by_libjpeg(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except (ValueError, KeyError):
        return True
    return False


def check_damaged_jpegs(seed: int, count: int, seconds: float) -> None:
    """No damaged file that libjpeg-turbo refuses may be taken for intact."""
    intact = 0
    refused = 0
    done = 0
    deadline = time.monotonic() + seconds
    for done, data in enumerate(islice(damaged_jpegs(seed), count), 1):
        if is_intact(data):
            intact += 1
            try:
                decode_strictly(data)
            except (ValueError, KeyError) as error:
                pytest.fail(f"damaged file {done} of seed {seed} was taken for intact: {error}")
        elif done % 16 == 0:
            refused += is_refused_by_libjpeg(data)
        if time.monotonic() > deadline:
            break
    print(f"{intact} of {done} damaged files taken for intact, about {16 * refused} refused")
    # Both have to occur for this to be a test.
    assert intact > done / 50
    assert refused > done / 100


def test_damaged_jpegs_that_libjpeg_refuses_are_not_taken_for_intact() -> None:
    check_damaged_jpegs(seed=0, count=20_000, seconds=60)


@pytest.mark.slow
def test_many_damaged_jpegs_that_libjpeg_refuses_are_not_taken_for_intact() -> None:
    check_damaged_jpegs(seed=time.time_ns(), count=300_000, seconds=180)


def test_every_ordinary_jpeg_is_intact() -> None:
    assert not [name for name, data in ORDINARY.items() if not is_intact(data)]


def test_unusual_jpegs_are_not_certain() -> None:
    assert not [name for name, data in UNUSUAL.items() if is_intact(data)]


def test_random_bytes_are_not_intact() -> None:
    rng = np.random.default_rng(0)
    for length in (*range(40), *range(100, 5000, 97)):
        assert not is_intact(rng.bytes(length))
        assert not is_intact(b"\xff\xd8" + rng.bytes(length))


def test_truncated_jpegs_are_not_intact() -> None:
    for data in list(ORDINARY.values())[:: len(ORDINARY) // 9]:
        assert not any(is_intact(data[:length]) for length in range(len(data)))


@pytest.mark.parametrize(
    "name", ["L 17x15 False", "2 33x16 True", "icc 8x8 False", "rgb 16x16 False"]
)
def test_truncated_segments_are_not_intact(name: str) -> None:
    """Each segment is cut to each length, and states that length.

    Only segments for applications, and comments, may be cut.
    """
    data = ORDINARY[name]
    at = 2
    while data[at : at + 2] != b"\xff\xda":
        marker = data[at : at + 2]
        length = int.from_bytes(data[at + 2 : at + 4])
        for kept in range(length):
            segment = marker + kept.to_bytes(2, "big") + data[at + 4 : at + 2 + kept]
            cut = data[:at] + segment + data[at + 2 + length :]
            if is_intact(cut):
                simplejpeg.decode_jpeg(cut, "RGB")
                assert marker[1] >= 0xE0
        at += 2 + length


def jpegs_with_warnings() -> dict[str, bytes]:
    """Changes that random damage rarely makes; libjpeg-turbo decodes some of them, but warns."""
    image = picture(40, 30)
    plain = encoded(image)
    rgb = encoded(image, keep_rgb=True)
    profile = encoded(image, icc_profile=b"p" * 50)
    profile_at = profile.index(b"\xff\xe2")
    profile_segment = profile[profile_at : profile_at + 4 + 14 + 50]
    adobe_at = rgb.index(b"Adobe")
    adobe = rgb[adobe_at : adobe_at + 12]
    code_counts = bytes((0, 1, 5, 1, 1, 1, 1, 1, 1))  # by length, of luma's DC
    return {
        "code of ones": plain.replace(code_counts, bytes((0, 1, 5, 1, 1, 1, 1, 2, 0)), 1),
        "DC symbol": plain.replace(bytes(range(12)), bytes((*range(11), 0x20)), 1),
        "JFIF version": plain.replace(b"JFIF\0\1", b"JFIF\0\2"),
        "Adobe transform": rgb.replace(adobe, adobe[:11] + b"\2"),
        "profile number": profile.replace(b"PROFILE\0\1\1", b"PROFILE\0\1\2"),
        "profile twice": profile.replace(profile_segment, profile_segment * 2),
        "spectral end": plain.replace(b"\0\x3f\0", b"\0\x3e\0"),
        "junk between markers": plain.replace(b"\xff\xdb", b"\0\xff\xdb", 1),
    }


@pytest.mark.parametrize("data", jpegs_with_warnings().values(), ids=jpegs_with_warnings())
def test_jpegs_that_libjpeg_warns_of_are_not_intact(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        simplejpeg.decode_jpeg(data, "RGB")
    assert not is_intact(data)


@pytest.mark.slow
def test_no_read_is_out_of_bounds() -> None:
    """With Numba's checks of each index, which are off otherwise, the verdicts are the same."""
    code = """
from itertools import islice
from tests.pipeline.conversion.test_jpeg_check import ORDINARY, damaged_jpegs, is_intact
files = [*ORDINARY.values(), *islice(damaged_jpegs(1), 2000)]
print("".join(str(int(is_intact(data))) for data in files))
"""
    environment = {
        **os.environ,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": os.environ["TWINFEED_CACHE"],
    }
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    verdicts = "".join(str(int(is_intact(data))) for data in islice(damaged_jpegs(1), 2000))
    assert run.stdout.strip() == "1" * len(ORDINARY) + verdicts
