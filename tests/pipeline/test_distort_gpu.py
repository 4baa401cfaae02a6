"""The Triton kernels of the distortions, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.distort import _load_gpu_kernels
from pipeline.distort import distort as distort_on_cpu
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
    Distort,
    assert_close_except_at_threshold,
    before_solarizing,
    crops_of,
    plain_recipe,
    unchanged,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small are slower on more threads, and much slower if a core is busy."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture
def kernels() -> Distort:
    """`distort_views` on a GPU, if there is one, or in Triton's interpreter."""
    pytest.importorskip("triton")
    from pipeline.distort_gpu import distort_views

    if not torch.cuda.is_available():
        return distort_views
    return lambda crops, *rest: tuple(view.cpu() for view in distort_views(crops.cuda(), *rest))


def sets_of_parameters() -> list[dict[str, object]]:
    """Sets of parameters, most of which do one thing, at several strengths."""
    jitters = [(i, f) for i in (BRIGHTNESS, CONTRAST, SATURATION) for f in (0.0, 0.6, 1.4)]
    jitters += [(HUE, f) for f in (-0.5, -0.1, 0.03, 0.1, 0.5)]
    sets: list[dict[str, object]] = [
        {},
        {"jitter": True},
        {"flip": True},
        {"gray": True},
        {"solarize": True},
    ]
    sets += [{"blur_sigma": sigma} for sigma in (0.1, 0.22, 0.4, 1.1, 2.0, 30.0)]
    sets += [{"gray": True, "blur_sigma": 1.3, "solarize": True, "flip": True}]
    return sets + [{"jitter": True, "jitter_factor": {i: f}} for i, f in jitters]


@pytest.mark.parametrize("size", [17, 40])  # less than a block of pixels, and two
def test_each_operation_is_that_of_the_cpu(kernels: Distort, size: int) -> None:
    sets = sets_of_parameters()
    params = unchanged(1, len(sets))
    params = ViewParams(*(np.array(field) for field in params))
    for i, fields in enumerate(sets):
        for name, value in fields.items():
            if name == "jitter_factor":
                for operation, factor in value.items():
                    params.jitter_factor[0, i, operation] = factor
            else:
                getattr(params, name)[0, i] = value
    recipe = plain_recipe(size)
    crops = crops_of(len(sets), size)
    crops[0, sets.index({"solarize": True})] = (
        torch.arange(size * size).reshape(size, size, 1) % 256
    )  # all levels
    (ours,) = kernels(crops, params, recipe, torch.float32)
    (expected,) = distort_on_cpu(crops, params, recipe)
    assert torch.equal(ours[:2], crops[0, :2].permute(0, 3, 1, 2) / 255)  # nothing is done to these
    torch.testing.assert_close(ours, expected, rtol=0, atol=4e-6)


def test_views_are_those_of_torchvision_in_float64(
    kernels: Distort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's two views, with a batch that is processed in several parts."""
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
            assert_close_except_at_threshold(
                view[i].double() * std + mean, before_solarizing(crops[v, i], row), row, 1e-5
            )
    first_two = params.take(slice(None), slice(2))
    half = kernels(crops[:, :2], first_two, recipe, torch.bfloat16)
    assert [view.dtype for view in half] == [torch.bfloat16] * 2
    planar = crops[:, :2].permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    for view, other in zip(half, kernels(planar, first_two, recipe, torch.bfloat16), strict=True):
        assert torch.equal(view, other)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_kernels_write_only_to_their_pixels(
    kernels: Distort, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program handles more pixels than this image has: the others must be masked."""
    size = 17
    empty = torch.empty
    blocks = []

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


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """To machine code for an A100 and for an H100 or H200, on any machine."""
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
        target = GPUTarget("cuda", capability, 32)
        compiled = compile(source, target=target, options=kernels._OPTIONS)
        print(name, capability, len(compiled.asm["cubin"]))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    for variable in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"):
        environment.pop(variable, None)
    root = Path(__file__).parents[2]
    # Users should see no warnings of Triton.
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8


def test_without_triton_a_gpu_uses_the_batched_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pipeline.distort_gpu", raising=False)
    with pytest.warns(
        UserWarning, match="Triton does not work on this machine: import of triton halted"
    ):
        assert _load_gpu_kernels.__wrapped__(cpu) is None
    monkeypatch.undo()
    assert _load_gpu_kernels.__wrapped__(cpu) is not None
