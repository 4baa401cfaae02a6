"""The staging file: images that are read once, and then at random."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.conversion.staging import stage_images
from tests.helpers.sources import JPEGS, contents_of


def test_iterable_is_read_once_and_then_at_random(scratch: Path) -> None:
    labels = ["dog", None, "ant", "dog", "cat", "ant", None]
    source = stage_images(iter(zip(JPEGS, labels, strict=True)), [], scratch)
    assert source.classes == ["ant", "cat", "dog"]
    assert contents_of(source) == [(f"image {i}", JPEGS[i], labels[i]) for i in range(7)]
    assert contents_of(pickle.loads(pickle.dumps(source))) == contents_of(source)


@pytest.mark.parametrize(
    ("labels", "classes", "expected_classes", "expected_labels"),
    [
        ([2, 0, np.int64(1)], [], ["0", "1", "2"], [2, 0, 1]),
        (["b", "c", "a", "b"], [], ["a", "b", "c"], [1, 2, 0, 1]),
        ([1, "b", "a", None], ["b", "a"], ["b", "a"], [1, 0, 1, -1]),
        ([None, None], [], [], [-1, -1]),
    ],
    ids=["numbers", "names", "known classes", "none"],
)
def test_labels_are_numbers_or_names(
    scratch: Path,
    labels: list[Any],
    classes: list[str],
    expected_classes: list[str],
    expected_labels: list[int],
) -> None:
    source = stage_images(zip(JPEGS, labels, strict=False), classes, scratch)
    assert (source.classes, source.labels.tolist()) == (expected_classes, expected_labels)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([-1], []),
        ([1 << 31], []),
        ([1 << 40], []),
        ([1.5], []),
        ([[1]], []),
        ([1.0], ["a", "b"]),
        ([0, "a"], []),
        (["a", 0], []),
        ([2], ["a", "b"]),
        ([-1], ["a", "b"]),
        (["c"], ["a"]),
    ],
    ids=str,
)
def test_other_labels_are_refused(scratch: Path, labels: list[Any], classes: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"image \d has the label .*: labels must .* None means no label"
    ):
        stage_images(zip(JPEGS, labels, strict=False), classes, scratch)


def test_empty_images_are_left_out_and_named(scratch: Path) -> None:
    source = stage_images([(b"", 0), (JPEGS[0], 0)], [], scratch)
    assert len(source) == 1
    assert source.rejects == {"image 0": "it is empty, or 2 GiB or larger"}
    message = "holds no image that can be used; the first, image 0: it is empty"
    with pytest.raises(ValueError, match=message):
        stage_images([(b"", 0)], [], scratch)


def test_complete_staging_file_is_used_again_and_a_partial_one_is_not(scratch: Path) -> None:
    def images(count: int, then: type[BaseException]) -> Iterator[tuple[bytes, int]]:
        yield b"", 0
        yield from ((JPEGS[i], i) for i in range(count))
        raise then

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage_images(images(3, KeyboardInterrupt), [], scratch, "seven")
    first = stage_images([(b"", 0), *zip(JPEGS, range(7), strict=True)], [], scratch, "seven")
    again = stage_images(images(0, AssertionError), [], scratch, "seven")  # not iterated over
    assert contents_of(again) == contents_of(first)
    assert (again.rejects, again.identity) == (first.rejects, first.identity)
    with pytest.raises(KeyboardInterrupt):
        stage_images(images(0, KeyboardInterrupt), [], scratch, "eight")

    stage_images(zip(JPEGS, range(7), strict=True), [], scratch, "seven")
    os.truncate(scratch / "spool", 100)
    with pytest.raises(KeyboardInterrupt):
        stage_images(images(0, KeyboardInterrupt), [], scratch, "seven")


def test_staging_file_without_an_identity_is_not_used_again(scratch: Path) -> None:
    one, other = (stage_images([(image, 0)], [], scratch).read(0) for image in JPEGS[:2])
    assert (one, other) == (JPEGS[0], JPEGS[1])


def test_identity_depends_on_images_and_labels(scratch: Path) -> None:
    sources = [
        [(JPEGS[0], 0)],
        [(JPEGS[0], 1)],
        [(JPEGS[0] + b"x", 0)],
        [(JPEGS[0], 0), (JPEGS[0], 0)],
        [(JPEGS[0], 0)],
    ]
    *different, same = (stage_images(source, [], scratch).identity for source in sources)
    assert len(set(different)) == 4
    assert same == different[0]


def test_memory_does_not_grow_with_the_images(scratch: Path) -> None:
    image = bytes(200_000)
    tracemalloc.start()
    images = ((image[i % 9 :], i % 10) for i in range(1000))  # 200 MB
    source = stage_images(images, [], scratch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.read(999)) == 200_000 - 999 % 9
    assert peak < 4e6


def test_full_disk_raises(scratch: Path) -> None:
    scratch.mkdir()
    (scratch / "spool").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        stage_images(((bytes(1 << 20), 0) for _ in range(3)), [], scratch)
