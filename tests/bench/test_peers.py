"""The peers of the benchmark do the same work as twinfeed: the paper's two views."""

from __future__ import annotations

import io
import os
import random
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.peers import Peer, installed_peers, missing_peers
from bench.photos import photo
from pipeline import LoaderOptions, barlow_twins, open_loader, open_store
from pipeline.recipe import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.images import encoded

NAMES = [
    "authors' transform (Pillow)",
    "lightly's BYOL transform",
    "torchvision v2 on tensors",
    "DALI's own operators",
    "kornia",
]
SIZE = 64
DRAWS = 12  # of 32 pictures each
# Tolerances of sharpness: lightly's crops are bilinear and 17% softer, kornia's are not antialiased
# and 31% sharper.
SHARPNESS_TOLERANCE = {"lightly's BYOL transform": 0.25, "kornia": 0.4}

MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=NAMES)
def peer(request: pytest.FixtureRequest) -> Peer:
    """Each peer; one that is not installed is skipped, or fails if everything must be installed."""
    reason = missing_peers().get(request.param)
    if reason and os.environ.get("TWINFEED_CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    (one,) = [peer for peer in installed_peers(SIZE) if peer.name == request.param]
    return one


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed all peers but DALI, which seeds itself: the bounds are four deviations wide."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (lightly draws from it)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def orange() -> list[bytes]:
    """Thirty-two drawn photos in orange light, so that no two channels have the same mean."""
    light = np.array([1.1, 0.8, 0.4])
    images = []
    for i in range(32):
        pixels = np.asarray(Image.open(io.BytesIO(photo(3, i, 160, 120)))) * light
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        images.append(encoded(image, quality=92))
    return images


def uniform(colour: tuple[int, int, int], count: int = 32) -> list[bytes]:
    """Images of one colour."""
    return [encoded(Image.new("RGB", (80, 60), colour), quality=95, subsampling=0)] * count


def draw_views(peer: Peer, pictures: list[bytes]) -> Pair:
    """Many views of each picture."""
    a, b = zip(*(peer.views(pictures) for _ in range(DRAWS)), strict=True)
    return torch.cat(a), torch.cat(b)


def middle_pixels(views: Tensor) -> Tensor:
    """The middle pixel of normalised views, [n, 3] in levels of 255."""
    middle = views[:, :, SIZE // 2, SIZE // 2]
    return 255 * (middle * STD + MEAN)


def fraction(which: Tensor) -> float:
    return float(which.float().mean())


class Appearance(NamedTuple):
    """Statistics of the pixels of view a and view b."""

    mean: Tensor  # [view, channel]
    std: Tensor  # [view]
    sharpness: Tensor  # [view]


def measure_appearance(views: Pair) -> Appearance:
    std = torch.stack([view.std() for view in views])
    steps = torch.stack([view.diff(dim=3).abs().mean() for view in views])
    return Appearance(torch.stack([view.mean((0, 2, 3)) for view in views]), std, steps / std)


@pytest.fixture(scope="module")
def ours(orange: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Appearance:
    folder = tmp_path_factory.mktemp("orange")
    for i, data in enumerate(orange):
        (folder / f"{i}.jpg").write_bytes(data)
    loader = open_loader(
        open_store(folder),
        barlow_twins(SIZE),
        LoaderOptions(batch_size=32, device="cpu", seed=0, threads=1),
    )
    a, b = zip(*(batch.views for batch in loader.steps(0, 2 * DRAWS)), strict=True)
    return measure_appearance((torch.cat(a), torch.cat(b)))


def test_each_call_draws_two_new_views_of_each_picture(peer: Peer, orange: list[bytes]) -> None:
    for count in (1, 5, 32):
        views = [*peer.views(orange[:count]), *peer.views(orange[:count])]
        for view in views:
            assert view.shape == (count, 3, SIZE, SIZE)
            assert view.dtype == torch.float32
            assert view.isfinite().all()
            # Normalised, black is at least -2.12 and white at most 2.64. kornia's bicubic crops
            # overshoot a little.
            assert view.min() > -2.4
            assert view.max() < 3.0
        for one, other in combinations(views, 2):
            for i in range(count):
                assert not torch.equal(one[i], other[i])


def test_the_views_look_like_ours(peer: Peer, orange: list[bytes], ours: Appearance) -> None:
    """Colours, contrast and sharpness of both views, in another implementation."""
    theirs = measure_appearance(draw_views(peer, orange))
    torch.testing.assert_close(theirs.mean, ours.mean, rtol=0, atol=0.2)
    torch.testing.assert_close(theirs.std, ours.std, rtol=0.1, atol=0)
    torch.testing.assert_close(
        theirs.sharpness, ours.sharpness, rtol=SHARPNESS_TOLERANCE.get(peer.name, 0.15), atol=0
    )


def test_colours_are_jittered_and_grey_as_often_as_in_the_paper(peer: Peer) -> None:
    colours = middle_pixels(draw_views(peer, uniform((200, 140, 80)))[0])
    gray = colours.amax(1) - colours.amin(1) < 4
    untouched = (colours - torch.tensor([200, 140, 80])).abs().amax(1) < 4
    assert fraction(gray) == pytest.approx(0.2, abs=0.08)
    assert fraction(untouched) == pytest.approx(0.2 * 0.8, abs=0.08)


def test_hues_are_shifted_as_far_as_in_the_paper(peer: Peer) -> None:
    colours = middle_pixels(draw_views(peer, uniform((200, 140, 80)))[0])
    gray = colours.amax(1) - colours.amin(1) < 4
    red, green, blue = colours[~gray].unbind(1)
    hue = torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))
    low, high = hue.quantile(torch.tensor([0.1, 0.9]))
    # Four of five views are shifted from a hue of 30 degrees, by up to 36 degrees.
    assert float(low) == pytest.approx(30 - 27, abs=15)
    assert float(high) == pytest.approx(30 + 27, abs=15)


def test_brightness_varies_as_far_as_in_the_paper(peer: Peer) -> None:
    # Nothing else changes this grey.
    views, _ = draw_views(peer, uniform((128, 128, 128)))
    brightness = middle_pixels(views).mean(1) / 128
    assert float(brightness.min()) == pytest.approx(0.6, abs=0.04)
    assert float(brightness.max()) == pytest.approx(1.4, abs=0.04)


def test_only_view_b_is_solarised(peer: Peer) -> None:
    """Jitter does not take this grey below 128, except for DALI's now and then; solarising does."""
    views_a, views_b = draw_views(peer, uniform((235, 235, 235)))
    solarised_a = middle_pixels(views_a).mean(1) < 127.5
    solarised_b = middle_pixels(views_b).mean(1) < 127.5
    assert fraction(solarised_a) == pytest.approx(0, abs=0.03)
    assert fraction(solarised_b) == pytest.approx(0.2, abs=0.08)


def test_half_of_the_views_are_flipped(peer: Peer) -> None:
    ramp = np.tile(np.linspace(20, 220, 80), (60, 1)).astype(np.uint8)
    pictures = [encoded(Image.fromarray(ramp).convert("RGB"), quality=95)] * 32
    for views in draw_views(peer, pictures):
        left = views[:, :, :, : SIZE // 2].mean((1, 2, 3))
        right = views[:, :, :, SIZE // 2 :].mean((1, 2, 3))
        assert fraction(right > left) == pytest.approx(0.5, abs=0.1)


def test_the_crops_of_the_two_views_are_independent(peer: Peer) -> None:
    """The picture is red on the left and blue on the right, so colours show where a crop is."""
    ramp = np.tile(np.linspace((220, 60, 40), (40, 60, 220), 80), (60, 1, 1)).astype(np.uint8)
    pictures = [encoded(Image.fromarray(ramp))] * 32
    places = []
    for views in draw_views(peer, pictures):
        mean = 255 * (views.mean((2, 3)) * STD + MEAN)  # [n, 3]
        places.append((mean[:, 0] - mean[:, 2]) / mean.sum(1))
    place_a, place_b = places
    assert float(place_a.std()) > 0.1
    correlation = torch.corrcoef(torch.stack((place_a, place_b)))[0, 1]
    assert abs(float(correlation)) < 0.25


def test_views_are_in_the_order_of_the_pictures(peer: Peer) -> None:
    """Forty pictures are more than one batch of DALI."""
    red = uniform((220, 60, 40), 5)
    blue = uniform((40, 60, 220), 35)
    colours = middle_pixels(peer.views([*red, *blue])[0])
    assert colours.shape == (40, 3)
    redness = colours[:, 0] - colours[:, 2]  # 0 if grey
    assert (redness[:5] > -4).all()
    assert (redness[5:] < 4).all()
