"""The walk over a JPEG's Huffman codes against libjpeg-turbo: never sure of what that refuses or warns of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.conversion import jpeg_check
from pipeline.conversion.jpeg_check import is_whole
from tests.helpers.images import encoded, picture

SIZES = [(1, 1), (7, 9), (8, 8), (16, 16), (17, 15), (33, 16), (40, 31), (90, 64)]
MARKERS = [
    b"\xff" + bytes([i])
    for i in (0, 1, 0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE, 0xFF)
]


def baseline() -> dict[str, bytes]:
    """Ordinary JPEGs of both encoders: grey, every common subsampling, RGB, with and without tables of their own."""
    kinds = {}
    for i, (width, height) in enumerate(SIZES):
        quality = (5, 30, 60, 75, 85, 92, 97, 100)[i]
        colour, grey = picture(width, height, seed=i), picture(width, height, seed=i, mode="L")
        for optimize in (False, True):
            of = f"{width}x{height} {optimize}"
            kinds[f"L {of}"] = encoded(grey, quality=quality, optimize=optimize)
            kinds[f"rgb {of}"] = encoded(colour, quality=quality, optimize=optimize, keep_rgb=True)
            kinds[f"icc {of}"] = encoded(
                colour, quality=quality, optimize=optimize, icc_profile=b"p" * 200
            )
            for subsampling in range(3):
                options = {"quality": quality, "subsampling": subsampling, "optimize": optimize}
                kinds[f"{subsampling} {of}"] = encoded(colour, **options)
        for subsampling in ("444", "422", "420", "440"):
            kinds[f"turbo {subsampling} {width}"] = simplejpeg.encode_jpeg(
                np.array(colour), quality, "RGB", subsampling
            )
    return kinds


def unusual() -> dict[str, bytes]:
    """JPEGs that libjpeg-turbo reads as well, of which nothing needs to be said."""
    kinds = {}
    for i, (width, height) in enumerate(SIZES):
        colour = picture(width, height, seed=i)
        kinds[f"progressive {i}"] = encoded(colour, quality=80, progressive=True)
        kinds[f"restart {i}"] = encoded(colour, quality=80, restart_marker_blocks=2)
        kinds[f"cmyk {i}"] = encoded(colour.convert("CMYK"), quality=80)
        kinds[f"411 {i}"] = simplejpeg.encode_jpeg(np.array(colour), 80, "RGB", "411")
        kinds[f"long icc {i}"] = encoded(colour, quality=80, icc_profile=b"p" * 70_000)
    return kinds


ORDINARY, UNUSUAL = baseline(), unusual()


def damage(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Bits flipped and bytes set anywhere or near an end; cut; parts removed, repeated, zeroed or exchanged."""
    changed, size = bytearray(data), len(data)
    scan = max(0, data.rfind(b"\xff\xda"))
    at, length = int(rng.integers(size)), int(rng.integers(1, rng.choice([3, 9, 99])))
    kind = rng.integers(14)
    if kind < 6:
        first, last = (
            (0, size),
            (0, min(scan + 14, size)),
            (scan, size),
            (max(0, size - 12), size),
        )[kind % 4]
        for i in rng.integers(first, last, int(rng.integers(1, 4))):
            changed[i] = (
                changed[i] ^ 1 << int(rng.integers(8))
                if rng.random() < 0.7
                else int(rng.integers(256))
            )
    elif kind == 6:
        del changed[size - int(rng.integers(1, 9)) if rng.random() < 0.5 else at :]
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


def damaged(seed: int) -> Iterator[bytes]:
    rng, whole = np.random.default_rng(seed), [*ORDINARY.values(), *UNUSUAL.values()]
    while True:
        data = whole[rng.integers(len(whole))]
        for _ in range(1 + int(rng.random() < 0.2)):
            data = damage(data, rng, whole[rng.integers(len(whole))]) or b"\xff"
        yield data


def never_wrong(seed: int, count: int, seconds: float) -> None:
    sure = refused = done = 0
    until = time.monotonic() + seconds
    for done, data in enumerate(damaged(seed), 1):
        claimed = is_whole(data)
        sure += claimed
        if claimed:
            try:
                simplejpeg.decode_jpeg_header(data)
                simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
                simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
            except (ValueError, KeyError) as error:
                pytest.fail(f"sure of damaged file {done} of seed {seed}: {error}")
        elif done % 16 == 0:
            try:
                simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
            except (ValueError, KeyError):
                refused += 1
        if done == count or time.monotonic() > until:
            break
    print(f"sure of {sure} of {done} damaged files; libjpeg-turbo refuses about {16 * refused}")
    assert sure > done / 50, "these say nothing about being sure"
    assert refused > done / 100, "these say nothing about being wrong"


def test_never_sure_of_what_libjpeg_refuses() -> None:
    never_wrong(seed=0, count=20_000, seconds=60)


@pytest.mark.slow
def test_never_sure_of_what_libjpeg_refuses_at_length() -> None:
    never_wrong(seed=time.time_ns(), count=300_000, seconds=180)


def test_sure_of_every_ordinary_jpeg() -> None:
    assert not [kind for kind, data in ORDINARY.items() if not is_whole(data)]


def test_not_sure_of_anything_else() -> None:
    assert not [kind for kind, data in UNUSUAL.items() if is_whole(data)]
    rng = np.random.default_rng(0)
    for length in (*range(40), *range(100, 5000, 97)):
        assert not is_whole(rng.bytes(length))
        assert not is_whole(b"\xff\xd8" + rng.bytes(length))
    for data in list(ORDINARY.values())[:: len(ORDINARY) // 9]:
        assert not any(is_whole(data[:length]) for length in range(len(data)))


def test_not_sure_of_segments_of_any_other_length() -> None:
    """Each segment cut to each length, its own length told truly; nothing but comments and the like may be cut."""
    for kind in ("L 17x15 False", "2 33x16 True", "icc 8x8 False", "rgb 16x16 False"):
        data, at = ORDINARY[kind], 2
        while data[at : at + 2] != b"\xff\xda":
            length = int.from_bytes(data[at + 2 : at + 4])
            for kept in range(length):
                cut = (
                    data[: at + 2]
                    + kept.to_bytes(2, "big")
                    + data[at + 4 : at + 2 + kept]
                    + data[at + 2 + length :]
                )
                if is_whole(cut):
                    simplejpeg.decode_jpeg(cut, "RGB")
                    assert data[at + 1] >= 0xE0
            at += 2 + length


def test_what_libjpeg_says_of_headers_is_known() -> None:
    """What random damage hardly finds: some of these are decoded, but not in silence."""
    image = picture(40, 30)
    plain, rgb = encoded(image), encoded(image, keep_rgb=True)
    profile = encoded(image, icc_profile=b"p" * 50)
    segment = profile[(at := profile.index(b"\xff\xe2")) : at + 4 + 14 + 50]
    counts = bytes((0, 1, 5, 1, 1, 1, 1, 1, 1))  # of the codes of each length, of luma's DC
    warned = {
        "code of ones": plain.replace(counts, bytes((0, 1, 5, 1, 1, 1, 1, 2, 0)), 1),
        "DC symbol": plain.replace(bytes(range(12)), bytes((*range(11), 0x20)), 1),
        "JFIF version": plain.replace(b"JFIF\0\1", b"JFIF\0\2"),
        "Adobe transform": rgb.replace(
            adobe := rgb[(at := rgb.index(b"Adobe")) : at + 12], adobe[:11] + b"\2"
        ),
        "profile number": profile.replace(b"PROFILE\0\1\1", b"PROFILE\0\1\2"),
        "profile twice": profile.replace(segment, segment * 2),
        "spectral end": plain.replace(b"\0\x3f\0", b"\0\x3e\0"),
        "junk between markers": plain.replace(b"\xff\xdb", b"\0\xff\xdb", 1),
    }
    for kind, data in warned.items():
        assert data not in (plain, rgb, profile), kind
        with pytest.raises(ValueError, match=r"\w"):
            simplejpeg.decode_jpeg(data, "RGB")
        assert not is_whole(data), kind


@pytest.mark.slow
def test_no_read_is_out_of_bounds() -> None:
    """The same answers where Numba checks each index, which it does not otherwise."""
    code = (
        "from test_entropy import damaged, is_whole, ORDINARY\nfrom itertools import islice\n"
        "print(*(int(is_whole(data)) for data in [*ORDINARY.values(), *islice(damaged(1), 2000)]), sep='')"
    )
    here = Path(__file__).parent
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": os.environ["TWINFEED_CACHE"]}
    env["PYTHONPATH"] = os.pathsep.join((str(here), str(here.parent)))
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    there, files = run.stdout.strip(), damaged(1)
    assert there == "1" * len(ORDINARY) + "".join(
        str(int(is_whole(next(files)))) for _ in range(2000)
    )


def test_a_cache_that_fails_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(jpeg_check._kernels, jpeg_check._walk, full)
    with pytest.warns(UserWarning, match="compiles anew"):
        assert is_whole(ORDINARY["L 40x31 True"])
    assert is_whole(ORDINARY["L 40x31 True"])
