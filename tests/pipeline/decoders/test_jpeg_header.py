"""Which images DALI may be given as they are."""

from __future__ import annotations

import pytest

from pipeline.decoders.jpeg_header import is_ordinary_jpeg
from tests.helpers.images import EXAMPLE_IMAGES
from tests.helpers.jpegs import ALL_IMAGES, ORDINARY_JPEGS, damaged_headers


@pytest.mark.parametrize("name", ALL_IMAGES)
def test_only_grey_and_ycbcr_jpegs_are_ordinary(name: str) -> None:
    assert is_ordinary_jpeg(ALL_IMAGES[name], 30, 41) == (name in ORDINARY_JPEGS)


@pytest.mark.parametrize("name", damaged_headers())
def test_jpegs_with_damaged_headers_are_not_ordinary(name: str) -> None:
    assert not is_ordinary_jpeg(damaged_headers()[name], 30, 41)


def test_jpegs_of_another_size_than_in_the_index_are_not_ordinary() -> None:
    assert not is_ordinary_jpeg(EXAMPLE_IMAGES["jpeg"], 41, 30)


@pytest.mark.parametrize("length", [0, 2, 3, 20, 300])
def test_truncated_jpegs_are_not_ordinary(length: int) -> None:
    assert not is_ordinary_jpeg(EXAMPLE_IMAGES["jpeg"][:length], 30, 41)
    assert not is_ordinary_jpeg(EXAMPLE_IMAGES["jpeg"][:-2], 30, 41)
