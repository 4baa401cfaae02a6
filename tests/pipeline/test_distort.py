"""The distortions against torchvision's functions in float64, and against the chain of Pillow that the paper used."""

from __future__ import annotations

import colorsys
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as T
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms._functional_tensor import _hsv2rgb, _rgb2hsv

from pipeline import LoaderOptions, distort_cpu, open_loader, open_store
from pipeline.distort import _load_gpu_kernels, distort_batched
from pipeline.distort import distort as distort_on_cpu
from pipeline.recipe import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    RandomResizedCrop,
    Recipe,
    View,
    ViewParams,
    barlow_twins,
    draw,
)
from tests.helpers.images import picture

THRESHOLD = 128 / 255
IDENTITY = (1.0, 1.0, 1.0, 0.0)
PLAIN = Recipe(
    32, RandomResizedCrop(), (View(),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)  # views in [0, 1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small are slower on more, and much slower where a core is taken."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def distort_in_batches(
    crops: Tensor, params: ViewParams, recipe: Recipe, out_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """What other devices do, here on the CPU."""
    return tuple(
        distort_batched(view, params.take(v), recipe, out_dtype) for v, view in enumerate(crops)
    )


Distort = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(params=[distort_on_cpu, distort_in_batches], ids=["fused", "batched"])
def distort(request: pytest.FixtureRequest) -> Distort:
    return request.param


def adjust_hue(x: Tensor, shift: float) -> Tensor:
    """torchvision's, without its rounding to float32 on the way in."""
    h, s, v = _rgb2hsv(x).unbind(-3)
    return _hsv2rgb(torch.stack(((h + shift) % 1, s, v), -3))


ADJUST_PILLOW = {
    BRIGHTNESS: T.adjust_brightness,
    CONTRAST: T.adjust_contrast,
    SATURATION: T.adjust_saturation,
    HUE: T.adjust_hue,
}
ADJUST = ADJUST_PILLOW | {HUE: adjust_hue}


def crops_of(count: int, size: int, views: int = 1) -> Tensor:
    """Pictures uint8 [V, B, S, S, 3]; flat ones, greys, extremes and pure noise among them."""
    rng = np.random.default_rng(count)
    images = [np.asarray(picture(size, size, seed)) for seed in range(views * count)]
    flat, noise = (
        np.full((size, size, 3), (9, 200, 77), dtype=np.uint8),
        rng.integers(0, 256, (size, size, 3)),
    )
    special = [
        flat,
        noise,
        np.repeat(noise[..., :1], 3, 2),
        255 * (noise > 127),
        np.zeros_like(flat),
        flat * 0 + 255,
    ]
    images[: min(len(special), len(images) // 4)] = special[: len(images) // 4]
    return torch.from_numpy(np.stack(images).astype(np.uint8)).reshape(views, count, size, size, 3)


def unchanged(views: int, count: int) -> ViewParams:
    """Parameters that do nothing."""
    shape = views, count
    never = np.zeros(shape, dtype=bool)
    return ViewParams(
        boxes=np.zeros((*shape, 4), dtype=np.float32),
        flip=never,
        jitter=never,
        jitter_order=np.broadcast_to(np.arange(4, dtype=np.int8), (*shape, 4)),
        jitter_factor=np.broadcast_to(np.array(IDENTITY, dtype=np.float32), (*shape, 4)),
        gray=never,
        blur_sigma=np.zeros(shape, dtype=np.float32),
        solarize=never,
    )


def blurred(x: Tensor, sigma: float) -> Tensor:
    """torchvision's blur of rows, then columns, with borders replicated far beyond the kernel's reach."""
    radius = math.ceil(9 * sigma) + 1
    x = F.pad(x[None], [radius] * 4, mode="replicate")[0]
    for kernel in (
        [2 * radius + 1, 1],
        [1, 2 * radius + 1],
    ):  # in one pass it takes thirty times as long
        x = T.gaussian_blur(x, kernel, [sigma, sigma])
    return x[..., radius:-radius, radius:-radius]


def before_solarizing(crop: Tensor, row: ViewParams) -> Tensor:
    """One crop uint8 [S, S, 3] by torchvision in float64, up to and without solarisation; [3, S, S] in [0, 1]."""
    x = crop.permute(2, 0, 1).double() / 255
    if row.flip:
        x = T.hflip(x)
    if row.jitter:
        for operation in row.jitter_order:
            x = ADJUST[int(operation)](x, float(row.jitter_factor[operation]))
    if row.gray:
        x = T.rgb_to_grayscale(x, 3)
    if row.blur_sigma > 0:
        x = blurred(x, float(row.blur_sigma))
    return x


def close(ours: Tensor, x: Tensor, row: ViewParams, tolerance: float) -> int:
    """Asserts that `ours` is `x` (solarised, where `row` says so); how many pixels stand at solarisation's threshold.

    Inverted or not, such a pixel is only 1/255 off.
    """
    expected = T.solarize(x, THRESHOLD) if row.solarize else x
    at_threshold = (
        (x - THRESHOLD).abs() < tolerance if row.solarize else torch.zeros_like(x, dtype=torch.bool)
    )
    off = (ours.double() - expected).abs()
    assert off.max() <= 1 / 255 + tolerance
    assert off[~at_threshold].max() <= tolerance
    return int(at_threshold.sum())


# ── all of them together ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str
)
def test_views_are_torchvisions_in_float64(
    distort: Distort, dtype: torch.dtype, tolerance: float
) -> None:
    """A thousand draws of the paper's two views, within 0.003 levels in float32.

    No pixel has to be left out for the hue: as a map of colours its shift is continuous, though its formula branches.
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
            at_threshold += close(
                view[i].double() * std + mean, before_solarizing(crops[v, i], row), row, tolerance
            )
    assert at_threshold < 1e-3 * crops.numel()


def test_normalisation_is_torchvisions(distort: Distort) -> None:
    recipe = Recipe(32, RandomResizedCrop(), (View(),), mean=(0.1, 0.2, 0.3), std=(0.5, 0.7, 0.9))
    crops = crops_of(20, 32)
    (view,) = distort(crops, unchanged(1, 20), recipe, torch.float64)
    expected = T.normalize(
        crops[0].permute(0, 3, 1, 2).double() / 255, list(recipe.mean), list(recipe.std)
    )
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-12)


def pillow_chain(image: Image.Image, row: ViewParams) -> Image.Image:
    """As in the authors' `Transform`: torchvision's jitter on Pillow images, Pillow's blur and solarisation."""
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


def test_views_are_near_those_of_the_authors_pillow_chain(distort: Distort) -> None:
    """Pillow rounds to whole levels after every operation and approximates the Gaussian: a level apart on average."""
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


def test_a_batch_is_what_pillow_and_torchvision_make_of_its_draws(photos: Path) -> None:
    """The whole way from the file: every view has the box and the parameters of its own sample, epoch and view."""
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


@pytest.fixture
def kernels() -> Distort:
    """Those for a GPU: there, or as Triton's interpreter understands them."""
    pytest.importorskip("triton")
    from pipeline.distort_gpu import distort_views

    if not torch.cuda.is_available():
        return distort_views
    return lambda crops, *rest: tuple(view.cpu() for view in distort_views(crops.cuda(), *rest))


def each_alone() -> list[dict[str, object]]:
    """Parameters of which each set does one thing, at several strengths; and some that do several."""
    jitters = [(i, f) for i in (BRIGHTNESS, CONTRAST, SATURATION) for f in (0.0, 0.6, 1.4)]
    jitters += [(HUE, f) for f in (-0.5, -0.1, 0.03, 0.1, 0.5)]
    found: list[dict[str, object]] = [
        {},
        {"jitter": True},
        {"flip": True},
        {"gray": True},
        {"solarize": True},
    ]
    found += [{"blur_sigma": sigma} for sigma in (0.1, 0.22, 0.4, 1.1, 2.0, 30.0)]
    found += [{"gray": True, "blur_sigma": 1.3, "solarize": True, "flip": True}]
    return found + [{"jitter": True, "jitter_factor": {i: f}} for i, f in jitters]


@pytest.mark.parametrize("size", [17, 40])  # less than a block of pixels, and two
def test_the_kernels_for_a_gpu_do_each_operation(kernels: Distort, size: int) -> None:
    sets = each_alone()
    params = unchanged(1, len(sets))
    params = ViewParams(*(np.array(field) for field in params))
    for i, fields in enumerate(sets):
        for name, value in fields.items():
            if name == "jitter_factor":
                for operation, factor in value.items():
                    params.jitter_factor[0, i, operation] = factor
            else:
                getattr(params, name)[0, i] = value
    recipe = Recipe(size, RandomResizedCrop(), (View(),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    crops = crops_of(len(sets), size)
    crops[0, sets.index({"solarize": True})] = (
        torch.arange(size * size).reshape(size, size, 1) % 256
    )  # all levels
    (ours,), (expected,) = (
        kernels(crops, params, recipe, torch.float32),
        distort_on_cpu(crops, params, recipe),
    )
    assert torch.equal(ours[:2], crops[0, :2].permute(0, 3, 1, 2) / 255)  # nothing is done to these
    torch.testing.assert_close(ours, expected, rtol=0, atol=4e-6)


def test_views_by_the_kernels_for_a_gpu_are_torchvisions_in_float64(
    kernels: Distort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's two views, in several parts: batches are cut."""
    count, size = 12, 32
    monkeypatch.setattr(sys.modules["pipeline.distort_gpu"], "_IMAGES", 7)
    recipe = barlow_twins(size, blur_p=(1.0, 0.5), solarize_p=(0.0, 0.5))
    params = draw(recipe, 1, 0, np.arange(count), *np.full((2, count), 100))
    crops = crops_of(count, size, views=2)
    mean, std = (
        torch.tensor(c, dtype=torch.float64)[:, None, None] for c in (recipe.mean, recipe.std)
    )
    for v, view in enumerate(kernels(crops, params, recipe, torch.float32)):
        assert view.is_contiguous(memory_format=torch.channels_last)
        for i in range(count):
            row = params.take(v, i)
            close(view[i].double() * std + mean, before_solarizing(crops[v, i], row), row, 1e-5)
    some = params.take(slice(None), slice(2))
    half = kernels(crops[:, :2], some, recipe, torch.bfloat16)
    assert [view.dtype for view in half] == [torch.bfloat16] * 2
    planar = crops[:, :2].permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    for view, other in zip(half, kernels(planar, some, recipe, torch.bfloat16), strict=True):
        assert torch.equal(view, other)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_the_kernels_for_a_gpu_write_nothing_beside_their_pixels(
    kernels: Distort, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has more places than this image has pixels: the rest must be masked."""
    size, empty, blocks = 17, torch.empty, []

    def spacious(
        shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, **options: object
    ) -> Tensor:
        count = math.prod(shape) if isinstance(shape, tuple) else shape
        block = empty(count + 4096, dtype=dtype, **options).fill_(77)
        blocks.append((block, count))
        return block[:count].reshape(shape)

    monkeypatch.setattr("pipeline.distort_gpu.torch.empty", spacious)
    params = unchanged(1, 1)._replace(blur_sigma=np.full((1, 1), sigma, dtype=np.float32))
    kernels(crops_of(1, size), params, Recipe(size, RandomResizedCrop(), (View(),)), torch.float32)
    assert len(blocks) == 3  # views, means, and planes before and after the rows are blurred
    for block, count in blocks:
        assert block[count:].eq(77).all()
    planes, count = blocks[2]
    assert planes[count // 2 : count].eq(77).all() == (sigma == 0)


def test_the_kernels_for_a_gpu_compile(tmp_path: Path) -> None:
    """To machine code for an A100 and an H100 or H200, on a machine that need not have one."""
    pytest.importorskip("triton")
    program = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import pipeline.distort_gpu as kernels

tensors = {"crops": "*u8", "out": "*fp32", "views": "*bf16"}
for name in ("_mean", "_colour", "_blur_rows", "_finish"):
    function = getattr(kernels, name)
    types = {argument: tensors.get(argument, "*fp32") for argument in function.arg_names}
    types |= {"pixels": "i32", "size": "i32", "BLOCK": "constexpr"}
    source = ASTSource(function, types, constexprs={"BLOCK": 1024})
    for capability in (80, 90):
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=kernels._OPTIONS)
        print(name, capability, len(compiled.asm["cubin"]))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    for variable in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
        environment.pop(variable, None)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-c",
        program,
    ]  # a user is to see no warnings of Triton's
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


def test_without_triton_a_gpu_distorts_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.distort_gpu", raising=False)
    with pytest.warns(UserWarning, match="Triton fails here: import of triton halted"):
        assert _load_gpu_kernels.__wrapped__(cpu) is None
    monkeypatch.undo()
    assert _load_gpu_kernels.__wrapped__(cpu) is not None


# ── each of them alone ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_each_jitter_is_torchvisions(distort: Distort, operation: int) -> None:
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
    """Python's colorsys on a 9 x 9 x 9 grid of colours, all ties and greys among them, shifted by half sextants."""
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


def test_the_flip_mirrors_left_and_right(distort: Distort) -> None:
    crops = crops_of(8, 32)
    params = unchanged(1, 8)._replace(flip=np.arange(8)[None] % 2 == 0)
    (view,) = distort(crops, params, PLAIN)
    expected = crops[0].numpy().copy()
    expected[::2] = expected[::2, :, ::-1]
    assert torch.equal(view.permute(0, 2, 3, 1), torch.from_numpy(expected) / 255)


def test_grey_is_torchvisions(distort: Distort) -> None:
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
def test_blur_of_a_few_pixels(distort: Distort, size: int) -> None:
    """Wide blurs are cut off at twice the size, and the finest change nothing."""
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


def test_solarising_inverts_128_and_more(distort: Distort) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    params = unchanged(1, 1)
    (view,) = distort(levels, params._replace(solarize=~params.solarize), PLAIN)
    expected = ImageOps.solarize(Image.fromarray(levels[0, 0].numpy()), 128)
    assert np.array_equal((255 * view[0]).round().permute(1, 2, 0), expected)


# ── only what is asked for ───────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_that_do_nothing_leave_pixels_as_they_were(distort: Distort) -> None:
    crops = crops_of(16, 32, views=2)
    expected = crops.permute(0, 1, 4, 2, 3) / 255
    still = unchanged(2, 16)
    for params in (
        still,
        still._replace(jitter=~still.jitter),
        still._replace(jitter_factor=still.jitter_factor + 1),
    ):
        for view, as_before in zip(distort(crops, params, PLAIN), expected, strict=True):
            assert torch.equal(view, as_before)


def test_a_sample_does_not_depend_on_its_batch(distort: Distort) -> None:
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
            torch.testing.assert_close(
                a[0], b[i], rtol=0, atol=4e-6
            )  # 1e-6 before the division by std


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_views_have_the_type_and_the_layout_asked_for(distort: Distort, dtype: torch.dtype) -> None:
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


def test_an_empty_batch_has_empty_views(distort: Distort) -> None:
    views = distort(torch.empty((2, 0, 8, 8, 3), dtype=torch.uint8), unchanged(2, 0), PLAIN)
    assert [view.shape for view in views] == [(0, 3, 8, 8)] * 2


def test_crops_may_have_any_strides(distort: Distort) -> None:
    recipe = barlow_twins(32)
    params = draw(recipe, 0, 0, np.arange(9), *np.full((2, 9), 100))
    crops = crops_of(9, 32, views=2)
    planar = crops.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    assert planar.stride() != crops.stride()
    expected = distort(crops, params, recipe)
    compiled = len(distort_cpu._kernel.signatures)
    for some in (planar, crops.transpose(0, 1).contiguous().transpose(0, 1)):
        for a, b in zip(distort(some, params, recipe), expected, strict=True):
            assert torch.equal(a, b)
    assert (
        len(distort_cpu._kernel.signatures) == compiled
    )  # which takes seconds, so not again for each layout
