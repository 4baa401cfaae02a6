"""The loss against its definition in plain float64, in both forms, on one process and on two."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model import BarlowTwins, barlow_loss, build_backbone, normalize

SHAPES = [(7, 5), (9, 18), (8, 40), (16, 6)]  # N, D: D below, at and above 2 N, N odd and even


def plain_c(z_a: Tensor, z_b: Tensor) -> Tensor:
    """C = bn(z_a)^T bn(z_b) / N, with the biased variance."""
    a, b = ((z - z.mean(0)) / (((z - z.mean(0)) ** 2).mean(0) + 1e-5).sqrt() for z in (z_a, z_b))
    return torch.einsum("ni,nj->ij", a, b) / len(a)


def plain_loss(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    c = plain_c(z_a, z_b)
    on = sum((c[i, i] - 1) ** 2 for i in range(len(c)))
    off = sum(
        (c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j), torch.zeros(())
    )
    return on + lambd * off


def embeddings(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two related views, neither centred nor of unit variance, in float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    b = 0.7 * a + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return 3 * a + 1, 0.2 * b - 5


def gradients(loss: Tensor, *z: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, z)


@pytest.mark.parametrize("form", ["dxd", "nxn", "auto"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_loss_and_its_gradient_are_those_of_the_definition(n: int, d: int, form: str) -> None:
    z_a, z_b = (z.requires_grad_() for z in embeddings(n, d))
    expected = plain_loss(z_a, z_b, 0.0051)
    found = barlow_loss(normalize(z_a), normalize(z_b), 0.0051, form).loss
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(gradients(found, z_a, z_b), gradients(expected, z_a, z_b), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["dxd", "nxn"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_readings_are_sums_and_means_over_c(n: int, d: int, form: str) -> None:
    z_a, z_b = embeddings(n, d)
    c = plain_c(z_a, z_b)
    outside = c[~torch.eye(d, dtype=torch.bool)]
    _, invariance, redundancy, diagonal_mean, off_diagonal_rms = barlow_loss(
        normalize(z_a), normalize(z_b), 0.1, form
    )
    expected = (
        (c.diagonal() - 1).square().sum(),
        outside.square().sum(),
        c.trace() / d,
        outside.square().mean().sqrt(),
    )
    torch.testing.assert_close((invariance, redundancy, diagonal_mean, off_diagonal_rms), expected)


def test_loss_of_one_dimension_has_no_redundancy() -> None:
    z_a, z_b = embeddings(6, 1)
    for form in ("dxd", "nxn"):
        parts = barlow_loss(normalize(z_a), normalize(z_b), 1.0, form)
        torch.testing.assert_close(parts.loss, parts.invariance)
        assert float(parts.off_diagonal_rms) < 1e-7


@pytest.mark.parametrize(("n", "d"), [(16, 256), (64, 32), (56, 64), (64, 129), (65, 65)])
def test_auto_takes_the_form_of_fewer_operations(n: int, d: int) -> None:
    def operations(form: str) -> int:
        a, b = (torch.randn(n, d, requires_grad=True) for _ in range(2))
        with FlopCounterMode(display=False) as counter:
            barlow_loss(a, b, 0.0051, form).loss.backward()
        return counter.get_total_flops()

    assert operations("auto") == min(operations("dxd"), operations("nxn")) > 0


def test_normalisation_is_batch_norm_in_training_mode() -> None:
    z = embeddings(9, 6)[0].requires_grad_()
    weight = torch.randn_like(z)
    expected = nn.BatchNorm1d(6, affine=False, dtype=torch.float64)(z)
    torch.testing.assert_close(normalize(z), expected, rtol=1e-12, atol=1e-12)
    (ours,) = gradients((normalize(z) * weight).sum(), z)
    (theirs,) = gradients((expected * weight).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(32, 12), (12, 32)])
def test_autocast_around_the_network_leaves_the_loss_in_float32(
    n: int, d: int, dtype: torch.dtype
) -> None:
    """Embeddings come in half precision; 1e-4 squared is not a float16."""
    network = BarlowTwins(build_backbone("resnet18", width=8), "8", 0.0051)
    network.backbone, network.projector = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    z_a, z_b = ((1e-4 * z).to(dtype) for z in embeddings(n, d))
    exact = plain_loss(z_a.double(), z_b.double(), 0.0051)
    with torch.autocast("cpu", dtype):
        loss = network(z_a, z_b).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)


Found = dict[tuple[int, int, str], list[Tensor]]


def gradients_of_a_rank(rank: int, folder: Path) -> None:
    """Saves what rank `rank` of two receives for its half of each batch."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    found: Found = {}
    for n, d in SHAPES:
        for form in ("dxd", "nxn"):
            mine = [z.chunk(2)[rank].clone().requires_grad_() for z in embeddings(2 * n, d)]
            parts = barlow_loss(normalize(mine[0]), normalize(mine[1]), 0.0051, form)
            found[n, d, form] = [*(part.detach() for part in parts), *gradients(parts.loss, *mine)]
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def rank_one(_: int, folder: Path) -> None:
    gradients_of_a_rank(1, folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """This process is rank 0, which saves the other one's start."""
    folder = tmp_path_factory.mktemp("ranks")
    other = torch.multiprocessing.spawn(rank_one, (folder,), join=False)
    gradients_of_a_rank(0, folder)
    while not other.join():
        pass
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", ["dxd", "nxn"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_two_ranks_have_the_loss_and_the_gradients_of_one(
    two_ranks: list[Found], n: int, d: int, form: str
) -> None:
    whole = [z.requires_grad_() for z in embeddings(2 * n, d)]
    loss = plain_loss(*whole, 0.0051)
    readings = barlow_loss(*(normalize(z.detach()) for z in whole), 0.0051, form)
    expected = gradients(loss, *whole)
    for rank, (*parts, grad_a, grad_b) in enumerate(found[n, d, form] for found in two_ranks):
        torch.testing.assert_close(parts[0], loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(tuple(parts), tuple(readings), rtol=1e-10, atol=1e-12)
        for ours, theirs in zip((grad_a, grad_b), expected, strict=True):
            torch.testing.assert_close(ours, theirs.chunk(2)[rank], rtol=1e-10, atol=1e-12)
