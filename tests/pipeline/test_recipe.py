"""The parameters that `draw` makes, field by field against torchvision's own samplers."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torchvision import transforms

from pipeline.draw import ViewParams, draw
from pipeline.philox import philox, uniform
from pipeline.recipe import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    CenterCrop,
    RandomResizedCrop,
    Recipe,
    View,
    barlow_twins,
    center_view,
    crop_view,
    whole_view,
)

# A p-value below this shows another distribution. The seeds are fixed, so no test fails by chance.
LEVEL = 1e-4
COUNT = 100_000
RECIPE = barlow_twins(224)


def drawn(
    height: int, width: int, recipe: Recipe = RECIPE, seed: int = 0, epoch: int = 0
) -> ViewParams:
    sizes = (np.full(COUNT, side, dtype=np.int32) for side in (height, width))
    return draw(recipe, seed, epoch, np.arange(COUNT), *sizes)


@pytest.fixture(scope="module")
def params() -> ViewParams:
    """The parameters of 100,000 images of 375 x 500 pixels."""
    return drawn(375, 500)


# Random words


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_values(
    key: tuple[int, int], counter: tuple[int, int, int, int], expected: tuple[int, ...]
) -> None:
    """Random123's `kat_vectors`, philox4x32-10."""
    assert philox(key[1] << 32 | key[0], *counter).tolist() == list(expected)
    many = philox(
        key[1] << 32 | key[0], np.full((3, 1), counter[0]), *counter[1:3], np.full(2, counter[3])
    )
    assert (many == np.reshape(np.array(expected, dtype=np.uint64), (4, 1, 1))).all()
    assert many.shape == (4, 3, 2)


def test_uniform_numbers_are_strictly_between_0_and_1() -> None:
    ends = uniform(np.array([0, 0xFFFFFFFF], dtype=np.uint64))
    assert 0 < ends[0] < 2**-32
    assert 1 - 2**-32 < ends[1] < 1


# Boxes


def uncorrelated(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    if a.std() == 0 or b.std() == 0:  # never or always happens
        return True
    return abs(np.corrcoef(a, b)[0, 1]) < 4.9 / np.sqrt(len(a))  # beyond that once in 1e6


def test_boxes_are_uniform_in_area_place_and_log_ratio() -> None:
    """In an image so large that rounding does not show, and square, so that every try fits."""
    side = 40_000
    crop = RandomResizedCrop(area=(0.08, 0.5))
    boxes = drawn(side, side, Recipe(8, crop, (View(), View()))).boxes.astype(np.float64)
    for left, top, right, bottom in np.moveaxis(boxes, -1, 1):
        width, height = right - left, bottom - top
        numbers = {
            "area": (width * height / side**2 - 0.08) / (0.5 - 0.08),
            "ratio": np.log(width / height * 4 / 3) / np.log(16 / 9),
            "left": left / (side - width),
            "top": top / (side - height),
        }
        for name, values in numbers.items():
            assert stats.kstest(values, stats.uniform.cdf).pvalue > LEVEL, name
        for (name, a), (other, b) in combinations(numbers.items(), 2):
            assert uncorrelated(a, b), (name, other)


class Case(NamedTuple):
    height: int
    width: int
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    area: tuple[float, float] = (0.08, 1.0)


@pytest.mark.parametrize(
    "case",
    [
        Case(375, 500),
        Case(32, 32),
        Case(640, 201),  # many tries do not fit
        Case(90, 1000),  # some have no try that fits: the central fallback
        Case(1000, 60),
        Case(256, 256, ratio=(0.5, 1.2), area=(0.3, 0.6)),
    ],
    ids=str,
)
def test_boxes_are_distributed_as_those_of_torchvision(case: Case) -> None:
    recipe = Recipe(8, RandomResizedCrop(case.area, case.ratio), (View(), View()))
    ours = drawn(case.height, case.width, recipe, seed=4).boxes[1].astype(np.float64)
    image = torch.empty(1, case.height, case.width)
    torch.manual_seed(0)
    sampler = transforms.RandomResizedCrop.get_params
    theirs = np.array(
        [sampler(image, list(case.area), list(case.ratio)) for _ in range(20_000)], dtype=np.float64
    )
    top, left, height, width = theirs.T
    for name, a, b in (
        ("left", ours[:, 0], left),
        ("top", ours[:, 1], top),
        ("right", ours[:, 2], left + width),
        ("bottom", ours[:, 3], top + height),
        ("area", (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1]), width * height),
        ("ratio", (ours[:, 2] - ours[:, 0]) / (ours[:, 3] - ours[:, 1]), width / height),
        (
            "left as a fraction of the free width",
            *(x / np.maximum(free, 1) for x, free in free_space(ours, theirs, case.width)),
        ),
    ):
        assert stats.ks_2samp(a, b, method="asymp").pvalue > LEVEL, name


def free_space(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], width: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The left edges, and the largest possible ones."""
    return [(ours[:, 0], width - (ours[:, 2] - ours[:, 0])), (theirs[:, 1], width - theirs[:, 3])]


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 300), (300, 2), (4, 9), (5, 5000), (33, 801)]
)
def test_boxes_of_extreme_images_are_inside_and_fall_back_as_in_torchvision(
    height: int, width: int
) -> None:
    boxes = drawn(height, width).boxes
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    assert np.array_equal(boxes, np.rint(boxes))
    assert left.min() >= 0
    assert top.min() >= 0
    assert (right - left).min() >= 1
    assert (bottom - top).min() >= 1
    assert right.max() <= width
    assert bottom.max() <= height
    # No try can reach such an area, so both use their fallback.
    nothing_fits = Recipe(8, RandomResizedCrop(area=(50.0, 60.0)), (View(),))
    one = draw(nothing_fits, 0, 0, np.array([7]), np.array([height]), np.array([width])).boxes[0, 0]
    get_params = transforms.RandomResizedCrop.get_params
    i, j, h, w = get_params(torch.empty(1, height, width), [50.0, 60.0], [3 / 4, 4 / 3])
    assert one.tolist() == [j, i, j + w, i + h]


# Distortions


def test_jitter_is_distributed_as_that_of_torchvision(params: ViewParams) -> None:
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(1)
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    theirs = [jitter.get_params(*strengths) for _ in range(20_000)]
    factors = np.array([drawn[1:] for drawn in theirs])
    powers = 4 ** np.arange(4)
    orders = np.array([drawn[0].numpy() for drawn in theirs]) @ powers
    for view in range(2):
        for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
            ours = params.jitter_factor[view, :, operation]
            assert stats.ks_2samp(ours, factors[:, operation], method="asymp").pvalue > LEVEL
        ours = params.jitter_order[view].astype(np.int64) @ powers
        seen, counts = np.unique(ours, return_counts=True)
        assert len(seen) == 24
        assert set(seen) == set(orders)
        assert stats.chisquare(counts).pvalue > LEVEL


def test_factors_are_uniform_in_their_ranges(params: ViewParams) -> None:
    ranges = {
        BRIGHTNESS: (0.6, 1.4),
        CONTRAST: (0.6, 1.4),
        SATURATION: (0.8, 1.2),
        HUE: (-0.1, 0.1),
    }
    for operation, (low, high) in ranges.items():
        for view in range(2):
            factor = params.jitter_factor[view, :, operation].astype(np.float64)
            assert stats.kstest(factor, stats.uniform(low, high - low).cdf).pvalue > LEVEL
            assert factor.min() >= low - 1e-7
            assert factor.max() <= high + 1e-7
    # By torchvision's rule, from max(0, 1 - 1.5).
    strong = Recipe(8, RandomResizedCrop(), (View(brightness=1.5),))
    factor = drawn(9, 9, strong).jitter_factor[0, :, BRIGHTNESS].astype(np.float64)
    assert stats.kstest(factor, stats.uniform(0, 2.5).cdf).pvalue > LEVEL
    assert (drawn(9, 9, strong).jitter_factor[0, :, [CONTRAST, SATURATION]] == 1).all()


def test_sigmas_are_uniform(params: ViewParams) -> None:
    for view in range(2):
        sigma = params.blur_sigma[view].astype(np.float64)
        assert stats.kstest(sigma[sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > LEVEL


def test_every_view_has_its_own_probabilities(params: ViewParams) -> None:
    published = {
        "flip": (0.5, 0.5),
        "jitter": (0.8, 0.8),
        "gray": (0.2, 0.2),
        "blur_sigma": (1.0, 0.1),
    }
    for field, probabilities in (published | {"solarize": (0.0, 0.2)}).items():
        for view, p in enumerate(probabilities):
            happened = int(np.count_nonzero(getattr(params, field)[view]))
            assert stats.binomtest(happened, COUNT, p).pvalue > LEVEL, (field, view)


def columns(params: ViewParams, view: int) -> dict[str, NDArray[np.float64]]:
    """Numbers of one view, independent of each other except for those of the box."""
    left, top, right, bottom = params.boxes[view].astype(np.float64).T
    numbers = {
        "box area": (right - left) * (bottom - top),
        "box ratio": np.log((right - left) / (bottom - top)),
        "box left": left / np.maximum(1, 500 - (right - left)),
        "box top": top / np.maximum(1, 375 - (bottom - top)),
        "flip": params.flip[view],
        "jitter": params.jitter[view],
        "first jitter": params.jitter_order[view, :, 0],
        "last jitter": params.jitter_order[view, :, 3],
        "gray": params.gray[view],
        "blurred": params.blur_sigma[view] > 0,
        "solarize": params.solarize[view],
    }
    numbers |= {f"factor {i}": params.jitter_factor[view, :, i] for i in range(4)}
    numbers |= {"sigma": params.blur_sigma[view]} if view == 0 else {}
    return {
        f"{name} of {view}": np.asarray(values, dtype=np.float64)
        for name, values in numbers.items()
    }


def test_fields_and_views_are_independent(params: ViewParams) -> None:
    numbers = columns(params, 0) | columns(params, 1)
    for (name, a), (other, b) in combinations(numbers.items(), 2):
        view, same_view = name[-1], name[-1] == other[-1]
        if same_view and (name.startswith("box") and other.startswith("box")):
            continue
        both_orders = {name.split()[1], other.split()[1]} == {"jitter"}
        if same_view and both_orders:  # the first operation is not the last one
            continue
        assert uncorrelated(a, b), (name, other, view)


def test_samples_epochs_and_seeds_are_independent(params: ViewParams) -> None:
    others = drawn(375, 500, epoch=1), drawn(375, 500, seed=1), drawn(375, 500, seed=1 << 32)
    for name, values in columns(params, 0).items():
        assert uncorrelated(values[:-1], values[1:]), name
        for other in others:
            assert uncorrelated(values, columns(other, 0)[name]), name


def test_draws_of_a_sample_do_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 500, (2, 5000))
    together = draw(RECIPE, 3, 2, np.arange(5000), heights, widths)
    chosen = rng.permutation(5000)[:37]
    apart = draw(RECIPE, 3, 2, chosen, heights[chosen], widths[chosen])
    for name, a, b in zip(ViewParams._fields, apart, together, strict=True):
        assert np.array_equal(a, b[:, chosen]), name


def test_empty_batch_has_empty_parameters() -> None:
    none = np.empty(0, dtype=np.int64)
    for recipe in (RECIPE, center_view(8)):
        params = draw(recipe, 0, 0, none, none, none)
        for name, field in zip(ViewParams._fields, params, strict=True):
            assert field.shape[:2] == (len(recipe.views), 0), name


def test_take_indexes_every_field_by_view_and_sample(params: ViewParams) -> None:
    taken = params.take(1, slice(10, 30))
    for name, a, b in zip(ViewParams._fields, taken, params, strict=True):
        assert np.array_equal(a, b[1, 10:30]), name


# Recipes


def test_center_view_draws_nothing() -> None:
    params = drawn(300, 400, center_view(224))
    assert params.boxes.shape == (1, COUNT, 4)
    for name in ("flip", "jitter", "gray", "blur_sigma", "solarize"):
        assert not getattr(params, name).any(), name


def test_crop_view_is_a_random_box_and_a_flip() -> None:
    recipe = crop_view(224)
    assert (recipe.crop, recipe.views) == (
        RandomResizedCrop((0.08, 1.0), (3 / 4, 4 / 3), "bilinear"),
        (View(0.5),),
    )
    params = drawn(300, 400, recipe)
    assert stats.binomtest(int(np.count_nonzero(params.flip)), COUNT, 0.5).pvalue > LEVEL
    for name in ("jitter", "gray", "blur_sigma", "solarize"):
        assert not getattr(params, name).any(), name


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (333, 500), (500, 353), (9, 500), (256, 256), (1, 1)]
)
def test_box_of_a_whole_image_is_its_size_after_resize_of_torchvision(
    size: tuple[int, int],
) -> None:
    height, width = transforms.Resize(256)(torch.zeros(1, *size)).shape[1:]
    one = draw(whole_view(224), 0, 0, np.array([7]), np.array([size[0]]), np.array([size[1]]))
    assert one.boxes[0, 0].tolist() == [0, 0, width, height]
    assert not one.flip.any()


def test_impossible_recipes_are_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        barlow_twins(0)
    with pytest.raises(ValueError, match="resize 200 is below size 224"):
        Recipe(224, CenterCrop(200), (View(),))
