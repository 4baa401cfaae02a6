"""The distortions against torchvision in float64, and against the Pillow chain of the paper."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from numba.core.event import install_recorder
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from pipeline import LoaderOptions, open_loader, open_store
from pipeline.distort import distort as distort_on_cpu
from pipeline.distort import distort_batched
from pipeline.draw import ViewParams, draw
from pipeline.recipe import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    RandomResizedCrop,
    Recipe,
    View,
    barlow_twins,
)
from tests.helpers.distortions import (
    ADJUST,
    ADJUST_PILLOW,
    THRESHOLD,
    Distort,
    assert_close_except_at_threshold,
    before_solarizing,
    blurred,
    crops_of,
    plain_recipe,
    unchanged,
)
from tests.helpers.images import picture

PLAIN = plain_recipe(32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small are slower on more threads, and much slower if a core is busy."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def distort_in_batches(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """The batched operations for other devices, on the CPU."""
    return tuple(
        distort_batched(view, params.take(v), recipe, out_dtype) for v, view in enumerate(crops)
    )


@pytest.fixture(params=[distort_on_cpu, distort_in_batches], ids=["compiled", "batched"])
def distort(request: pytest.FixtureRequest) -> Distort:
    return request.param


# All of them together


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str
)
def test_views_are_those_of_torchvision_in_float64(
    distort: Distort, dtype: torch.dtype, tolerance: float
) -> None:
    """A thousand draws of the paper's two views, within 0.003 levels in float32.

    No pixel has to be left out for the hue: its formula branches, but is continuous.
    """
    count, size = 500, 32
    recipe = barlow_twins(size, blur_p=(1.0, 0.5), solarize_p=(0.0, 0.5))
    params = draw(recipe, 1, 0, np.arange(count), *np.full((2, count), 100))
    crops = crops_of(count, size, views=2)
    mean, std = (
        torch.tensor(c, dtype=torch.float64)[:, None, None] for c in (recipe.mean, recipe.std)
    )
    at_threshold = 0
    for v, view in enumerate(distort(crops, params, recipe, dtype)):
        assert view.dtype == dtype
        for i in range(count):
            row = params.take(v, i)
            at_threshold += assert_close_except_at_threshold(
                view[i].double() * std + mean, before_solarizing(crops[v, i], row), row, tolerance
            )
    assert at_threshold < 1e-3 * crops.numel()


def test_normalisation_is_that_of_torchvision(distort: Distort) -> None:
    recipe = Recipe(32, RandomResizedCrop(), (View(),), mean=(0.1, 0.2, 0.3), std=(0.5, 0.7, 0.9))
    crops = crops_of(20, 32)
    (view,) = distort(crops, unchanged(1, 20), recipe, torch.float64)
    expected = T.normalize(
        crops[0].permute(0, 3, 1, 2).double() / 255, list(recipe.mean), list(recipe.std)
    )
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-12)


def pillow_chain(image: Image.Image, row: ViewParams) -> Image.Image:
    """The authors' `Transform`: torchvision's jitter on Pillow images, the rest by Pillow."""
    if row.flip:
        image = T.hflip(image)
    if row.jitter:
        for operation in row.jitter_order:
            image = ADJUST_PILLOW[int(operation)](image, float(row.jitter_factor[operation]))
    if row.gray:
        image = T.rgb_to_grayscale(image, 3)
    if row.blur_sigma > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row.blur_sigma)))
    return ImageOps.solarize(image) if row.solarize else image


def test_views_are_near_those_of_the_pillow_chain_of_the_authors(distort: Distort) -> None:
    """About a level apart: Pillow rounds after every operation and approximates the Gaussian."""
    count, size = 500, 64
    recipe = barlow_twins(size)
    params = draw(recipe, 2, 0, np.arange(count), *np.full((2, count), 100))
    crops = torch.from_numpy(
        np.stack([np.asarray(picture(size, size, seed)) for seed in range(2 * count)])
    )
    crops = crops.reshape(2, count, size, size, 3)
    mean, std = (torch.tensor(c)[:, None, None] for c in (recipe.mean, recipe.std))
    differences = []
    for v, view in enumerate(distort(crops, params, recipe)):
        ours = ((view * std + mean) * 255).permute(0, 2, 3, 1).numpy()
        for i in range(count):
            theirs = pillow_chain(Image.fromarray(crops[v, i].numpy()), params.take(v, i))
            differences.append(np.abs(ours[i] - np.asarray(theirs, dtype=np.float32)).mean())
    assert len(differences) == 1000
    assert np.mean(differences) <= 1.5


def test_batch_from_files_is_that_of_pillow_and_torchvision(photos: Path) -> None:
    """Every view has the box and the parameters of its own sample, epoch and view."""
    store, recipe = open_store(photos), barlow_twins(40)
    mean, std = (torch.tensor(c)[:, None, None] for c in (recipe.mean, recipe.std))
    loader = open_loader(store, recipe, LoaderOptions(batch_size=20, threads=2, seed=11))
    for step, batch in enumerate(loader.steps(0, 6)):
        samples = batch.samples.numpy()
        rows = store.index[samples]
        params = draw(recipe, 11, step // 3, samples, rows["height"], rows["width"])
        for v, view in enumerate(batch.views):
            for i, sample in enumerate(samples):
                row = params.take(v, i)
                image = Image.open(store.name(int(sample))).crop(
                    tuple(row.boxes.astype(int).tolist())
                )
                crop = torch.from_numpy(np.array(image.resize((40, 40), Image.Resampling.BICUBIC)))
                x = before_solarizing(crop, row)
                expected = T.solarize(x, THRESHOLD) if row.solarize else x
                assert (view[i] * std + mean - expected).abs().mean() <= 1 / 255


# Each of them alone


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_each_jitter_operation_is_that_of_torchvision(distort: Distort, operation: int) -> None:
    factors = (
        (-0.5, -0.1, -1 / 6, 0.03, 1 / 3, 0.5) if operation == HUE else (0.0, 0.37, 0.99, 1.2, 2.5)
    )
    crops = crops_of(len(factors) * 6, 32)
    params = unchanged(1, crops.shape[1])
    factor = params.jitter_factor.copy()
    factor[..., operation] = np.tile(factors, 6)
    params = params._replace(jitter=~params.jitter, jitter_factor=factor)
    (view,) = distort(crops, params, PLAIN, torch.float64)
    for i, crop in enumerate(crops[0]):
        expected = ADJUST[operation](
            crop.permute(2, 0, 1).double() / 255, float(factor[0, i, operation])
        )
        torch.testing.assert_close(view[i], expected, rtol=0, atol=1e-11)


def test_hue_is_exact_where_its_formula_branches(distort: Distort) -> None:
    """Against colorsys on a 9 x 9 x 9 grid of colours with all ties and greys; half sextants."""
    level = torch.linspace(0, 255, 9).round().byte()
    colours = torch.cartesian_prod(level, level, level).reshape(27, 27, 3)
    shifts = np.array([i / 12 for i in range(-6, 7) if i], dtype=np.float32)
    params = unchanged(1, len(shifts))
    factor = params.jitter_factor.copy()
    factor[0, :, HUE] = shifts
    params = params._replace(jitter=~params.jitter, jitter_factor=factor)
    (view,) = distort(colours.expand(1, len(shifts), -1, -1, -1), params, PLAIN, torch.float64)
    for i, shift in enumerate(shifts.tolist()):
        expected = []
        for rgb in (colours.reshape(-1, 3).double() / 255).tolist():
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
        ours = view[i].permute(1, 2, 0).reshape(-1, 3)
        torch.testing.assert_close(
            ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_flip_mirrors_left_and_right(distort: Distort) -> None:
    crops = crops_of(8, 32)
    params = unchanged(1, 8)._replace(flip=np.arange(8)[None] % 2 == 0)
    (view,) = distort(crops, params, PLAIN)
    expected = crops[0].numpy().copy()
    expected[::2] = expected[::2, :, ::-1]
    assert torch.equal(view.permute(0, 2, 3, 1), torch.from_numpy(expected) / 255)


def test_grey_is_that_of_torchvision(distort: Distort) -> None:
    crops = crops_of(24, 32)
    params = unchanged(1, 24)
    (view,) = distort(crops, params._replace(gray=~params.gray), PLAIN, torch.float64)
    expected = T.rgb_to_grayscale(crops[0].permute(0, 3, 1, 2).double() / 255, 3)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [9, 32, 97])
def test_blur_is_the_gaussian_with_replicated_borders(distort: Distort, size: int) -> None:
    sigmas = np.array([0.1, 0.3, 0.7, 1.0, 1.5, 2.0], dtype=np.float32)
    crops = crops_of(12, size)
    params = unchanged(1, 12)._replace(blur_sigma=np.tile(sigmas, 2)[None])
    (view,) = distort(crops, params, PLAIN, torch.float64)
    for i in range(12):
        expected = blurred(
            crops[0, i].permute(2, 0, 1).double() / 255, float(params.blur_sigma[0, i])
        )
        torch.testing.assert_close(view[i], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_blur_of_tiny_images_and_extreme_sigmas(distort: Distort, size: int) -> None:
    """The widest blurs are cut off at twice the size, and the finest change nothing."""
    sigmas = np.array([1e-30, 1e-6, 0.3, 1e4, 1e30], dtype=np.float32)
    crops = crops_of(1, size).expand(-1, len(sigmas), -1, -1, -1)
    (view,) = distort(crops, unchanged(1, len(sigmas))._replace(blur_sigma=sigmas[None]), PLAIN)
    x = crops[0, 0].permute(2, 0, 1).double() / 255
    for i, sigma in enumerate((None, None, 0.3)):
        torch.testing.assert_close(
            view[i].double(), blurred(x, sigma) if sigma else x, rtol=0, atol=1e-6
        )
    torch.testing.assert_close(view[3], view[4], rtol=0, atol=1e-6)
    if size == 1:
        torch.testing.assert_close(view[4].double(), x, rtol=0, atol=1e-6)
    else:
        assert (view[4] - view[4].mean((1, 2), keepdim=True)).abs().max() <= 0.2 * (
            x - x.mean()
        ).abs().max()


def test_solarisation_inverts_128_and_more(distort: Distort) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    params = unchanged(1, 1)
    (view,) = distort(levels, params._replace(solarize=~params.solarize), PLAIN)
    expected = ImageOps.solarize(Image.fromarray(levels[0, 0].numpy()), 128)
    assert np.array_equal((255 * view[0]).round().permute(1, 2, 0), expected)


# Independence of the batch and its layout


def test_neutral_parameters_leave_pixels_unchanged(distort: Distort) -> None:
    crops = crops_of(16, 32, views=2)
    expected = crops.permute(0, 1, 4, 2, 3) / 255
    neutral = unchanged(2, 16)
    for params in (
        neutral,
        neutral._replace(jitter=~neutral.jitter),
        neutral._replace(jitter_factor=neutral.jitter_factor + 1),
    ):
        for view, as_before in zip(distort(crops, params, PLAIN), expected, strict=True):
            assert torch.equal(view, as_before)


def test_sample_does_not_depend_on_its_batch(distort: Distort) -> None:
    count, size = 70, 48
    recipe = barlow_twins(size, blur_p=(1.0, 0.3))
    params = draw(recipe, 5, 0, np.arange(count), *np.full((2, count), 100))
    crops = crops_of(count, size, views=2)
    together = distort(crops, params, recipe)
    for i in range(count):
        alone = distort(crops[:, i : i + 1], params.take(slice(None), slice(i, i + 1)), recipe)
        for a, b in zip(alone, together, strict=True):
            if distort is distort_on_cpu:
                assert torch.equal(a[0], b[i])
            # 1e-6 before the division by std.
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_views_have_the_requested_dtype_and_layout(distort: Distort, dtype: torch.dtype) -> None:
    recipe = barlow_twins(32)
    params = draw(recipe, 0, 0, np.arange(9), *np.full((2, 9), 100))
    crops = crops_of(9, 32, views=2)
    before = crops.clone()
    exact = distort(crops, params, recipe, torch.float32)
    for view, reference in zip(distort(crops, params, recipe, dtype), exact, strict=True):
        assert view.dtype == dtype
        assert view.shape == (9, 3, 32, 32)
        assert view.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            view.to(torch.float32), reference.to(dtype).float(), rtol=0, atol=1e-4
        )
    assert torch.equal(crops, before)


def test_empty_batch_has_empty_views(distort: Distort) -> None:
    views = distort(torch.empty((2, 0, 8, 8, 3), dtype=torch.uint8), unchanged(2, 0), PLAIN)
    assert [view.shape for view in views] == [(0, 3, 8, 8)] * 2


def test_crops_may_have_any_strides(distort: Distort) -> None:
    recipe = barlow_twins(32)
    params = draw(recipe, 0, 0, np.arange(9), *np.full((2, 9), 100))
    crops = crops_of(9, 32, views=2)
    planar = crops.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert planar.stride() != crops.stride()
    expected = distort(crops, params, recipe)
    for strided in (planar, crops.transpose(0, 1).contiguous().transpose(0, 1)):
        for a, b in zip(distort(strided, params, recipe), expected, strict=True):
            assert torch.equal(a, b)


def test_kernel_is_not_compiled_again_for_other_strides() -> None:
    """Compiling takes seconds."""
    recipe = barlow_twins(32)
    params = draw(recipe, 0, 0, np.arange(9), *np.full((2, 9), 100))
    crops = crops_of(9, 32, views=2)
    strided = crops.transpose(2, 3).contiguous().transpose(2, 3)
    # In float64, with which no other test distorts strided crops.
    distort_on_cpu(crops, params, recipe, torch.float64)
    with install_recorder("numba:compile") as recorder:
        distort_on_cpu(strided, params, recipe, torch.float64)
    assert recorder.buffer == []
