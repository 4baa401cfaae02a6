"""The loss in both forms, on one process and on two, compared with its definition in float64."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model import BarlowTwins, barlow_loss, build_backbone, normalize
from tests.helpers.reference import cross_correlation

SHAPES = [(7, 5), (9, 18), (8, 40), (16, 6)]  # N, D: D below, at and above 2 N; N odd and even


def reference_loss(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """The definition, element by element."""
    c = cross_correlation(z_a, z_b)
    invariance = redundancy = torch.zeros(())
    for i in range(len(c)):
        for j in range(len(c)):
            if i == j:
                invariance = invariance + (c[i, i] - 1) ** 2
            else:
                redundancy = redundancy + c[i, j] ** 2
    return invariance + lambd * redundancy


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
def test_the_loss_and_its_gradient_follow_the_definition(n: int, d: int, form: str) -> None:
    z_a, z_b = (z.requires_grad_() for z in embeddings(n, d))
    expected = reference_loss(z_a, z_b, 0.0051)
    found = barlow_loss(normalize(z_a), normalize(z_b), 0.0051, form).loss
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    for ours, theirs in zip(gradients(found, z_a, z_b), gradients(expected, z_a, z_b), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["dxd", "nxn"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_the_parts_of_the_loss_are_sums_and_means_over_c(n: int, d: int, form: str) -> None:
    z_a, z_b = embeddings(n, d)
    parts = barlow_loss(normalize(z_a), normalize(z_b), 0.1, form)
    c = cross_correlation(z_a, z_b)
    off_diagonal = c[~torch.eye(d, dtype=torch.bool)]
    torch.testing.assert_close(parts.invariance, (c.diagonal() - 1).square().sum())
    torch.testing.assert_close(parts.redundancy, off_diagonal.square().sum())
    torch.testing.assert_close(parts.diagonal_mean, c.trace() / d)
    torch.testing.assert_close(parts.off_diagonal_rms, off_diagonal.square().mean().sqrt())


def test_one_dimension_has_no_redundancy() -> None:
    z_a, z_b = embeddings(6, 1)
    for form in ("dxd", "nxn"):
        parts = barlow_loss(normalize(z_a), normalize(z_b), 1.0, form)
        torch.testing.assert_close(parts.loss, parts.invariance)
        assert float(parts.off_diagonal_rms) < 1e-7


@pytest.mark.parametrize(("n", "d"), [(16, 256), (64, 32), (56, 64), (64, 129), (65, 65)])
def test_auto_chooses_the_form_with_fewer_operations(n: int, d: int) -> None:
    def operations(form: str) -> int:
        a, b = (torch.randn(n, d, requires_grad=True) for _ in range(2))
        with FlopCounterMode(display=False) as counter:
            barlow_loss(a, b, 0.0051, form).loss.backward()
        return counter.get_total_flops()

    assert operations("auto") == min(operations("dxd"), operations("nxn")) > 0


def test_normalize_is_batch_norm_in_training_mode() -> None:
    z = embeddings(9, 6)[0].requires_grad_()
    weight = torch.randn_like(z)
    expected = nn.BatchNorm1d(6, affine=False, dtype=torch.float64)(z)
    torch.testing.assert_close(normalize(z), expected, rtol=1e-12, atol=1e-12)
    (ours,) = gradients((normalize(z) * weight).sum(), z)
    (theirs,) = gradients((expected * weight).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(32, 12), (12, 32)])
def test_the_loss_is_computed_in_float32_within_autocast(
    n: int, d: int, dtype: torch.dtype
) -> None:
    """Embeddings are in half precision, and 1e-4 squared underflows in float16."""
    network = BarlowTwins(build_backbone("resnet18", width=8), "8", 0.0051)
    network.backbone, network.projector = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    z_a, z_b = ((1e-4 * z).to(dtype) for z in embeddings(n, d))
    exact = reference_loss(z_a.double(), z_b.double(), 0.0051)
    with torch.autocast("cpu", dtype):
        loss = network(z_a, z_b).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)


# By (N, D, form): the parts of the loss, and the gradients of both embeddings.
Results = dict[tuple[int, int, str], list[Tensor]]


def run_rank(rank: int, folder: Path) -> None:
    """Save the loss and gradients of one of two ranks, for its half of each batch."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    results: Results = {}
    for n, d in SHAPES:
        for form in ("dxd", "nxn"):
            own = [z.chunk(2)[rank].clone().requires_grad_() for z in embeddings(2 * n, d)]
            parts = barlow_loss(normalize(own[0]), normalize(own[1]), 0.0051, form)
            results[n, d, form] = [*(part.detach() for part in parts), *gradients(parts.loss, *own)]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run_rank1(_: int, folder: Path) -> None:
    run_rank(1, folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """The results of both ranks. This process is rank 0, which saves starting another one."""
    folder = tmp_path_factory.mktemp("ranks")
    other = torch.multiprocessing.spawn(run_rank1, (folder,), join=False)
    run_rank(0, folder)
    while not other.join():
        pass
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", ["dxd", "nxn"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_two_ranks_compute_the_loss_and_the_gradients_of_one(
    two_ranks: list[Results], n: int, d: int, form: str
) -> None:
    z_a, z_b = (z.requires_grad_() for z in embeddings(2 * n, d))
    loss = reference_loss(z_a, z_b, 0.0051)
    expected_gradients = gradients(loss, z_a, z_b)
    one_rank = barlow_loss(normalize(z_a.detach()), normalize(z_b.detach()), 0.0051, form)
    for rank, results in enumerate(two_ranks):
        *parts, grad_a, grad_b = results[n, d, form]
        torch.testing.assert_close(parts[0], loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(tuple(parts), tuple(one_rank), rtol=1e-10, atol=1e-12)
        for ours, theirs in zip((grad_a, grad_b), expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs.chunk(2)[rank], rtol=1e-10, atol=1e-12)
