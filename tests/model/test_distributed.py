"""One, two and four processes train the same network; and what else they say to each other.

All processes are started once, together: every rank runs the cases, one after the other, and saves what it found.
"""

from __future__ import annotations

import os
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from model import (
    LARS,
    BarlowTwins,
    Distributed,
    build_backbone,
    compile_and_wrap,
    learning_rate_factor,
    parameter_groups,
)
from model.batch_norm import BatchNorm1d, BatchNorm2d
from tests.model.test_loss import plain_c
from tests.model.test_model import lars_by_hand, randomised, views

CPU, BATCH, STEPS = torch.device("cpu"), 16, 20
WEIGHT_DECAY, ETA, MOMENTUM, LAMBD = 0.01, 0.02, 0.9, 0.0051
RATES = [
    (factor, 0.004 * factor)
    for factor in (learning_rate_factor(step, STEPS, 4) for step in range(STEPS))
]


class Case(NamedTuple):
    """A network, by default every kind of block of a ResNet-18 once, and how it is run."""

    projector: str = "24-24-16"  # D x D, if its last width is below 32
    blocks: tuple[int, ...] = (1, 1, 1, 1)  # in each stage
    steps: range = range(STEPS)
    dtype: torch.dtype = torch.float64
    one_pass: bool = False
    recompute: bool = False
    backend: str = ""  # of the compiler, if any


DXD, NXN = Case(), Case("96-96-96", blocks=(1, 1, 0, 0))
CASES = {
    "dxd": DXD,
    "nxn": NXN,
    # A step whose batch has no value so near to 0 that rounding decides whether a ReLU lets it pass.
    "float32": NXN._replace(dtype=torch.float32, steps=range(1, 2)),
}
VARIANTS = {  # of two ranks
    "one pass": DXD._replace(one_pass=True, steps=range(4)),
    "recomputed": DXD._replace(recompute=True, steps=range(4)),
    "traced": NXN._replace(
        one_pass=True, recompute=True, backend="aot_eager", blocks=(1, 0, 0, 0), steps=range(3)
    ),
}
COMPILED = {
    "compiled": NXN._replace(one_pass=True, backend="inductor", blocks=(1, 0, 0, 0), steps=range(4))
}
Found = dict[str, Any]


def network(case: Case) -> BarlowTwins:
    backbone = build_backbone("resnet18", 8, small_stem=True)
    stages = backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4
    for stage, blocks in zip(stages, case.blocks, strict=True):
        del stage[blocks:]
    backbone.out_features = 8 * 2 ** (len(list(filter(len, stages))) - 1)
    made = randomised(BarlowTwins(backbone, case.projector, LAMBD, one_pass=case.one_pass)).to(
        case.dtype
    )
    assert isinstance(made, BarlowTwins)
    if case.recompute:
        made.backbone.recompute_activations()
    return made


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in of.state_dict().items()}


def trained(case: Case, rank: int = 0, size: int = 1) -> Found:
    """The losses of a run, its weights and averages afterwards, and how many graphs were compiled."""
    ours = network(case)
    with torch.no_grad():
        for p in ours.parameters():
            p += rank  # all begin with those of the first
    graphs, torch_compile = CompileCounterWithBackend(case.backend), torch.compile
    torch.compile = lambda function, mode: torch_compile(function, backend=graphs, fullgraph=True)  # type: ignore
    try:
        forward = compile_and_wrap(CPU, ours, "default" if case.backend else None)
    finally:
        torch.compile = torch_compile
    optimizer, losses = LARS(parameter_groups(ours, WEIGHT_DECAY), momentum=MOMENTUM, eta=ETA), []
    for step in case.steps:
        for group, rate in zip(optimizer.param_groups, RATES[step], strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        loss = forward(
            *(view.chunk(size)[rank] for view in views(BATCH, 16, step, case.dtype))
        ).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": state(ours), "graphs": graphs.frame_count}


@cache
def alone(name: str) -> Found:
    """The same on one rank, without a compiler."""
    return trained((CASES | VARIANTS | COMPILED)[name]._replace(backend=""))


# ── what a rank does ─────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = {"1d": (8, 5), "2d": (8, 5, 3, 2)}


def rows(shape: tuple[int, ...], view: int) -> Tensor:
    """[B, C, ...] of one view in the global batch; each channel has another mean."""
    generator = torch.Generator().manual_seed(view)
    offsets = 10 * torch.arange(shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (1 + view) * torch.randn(shape, generator=generator, dtype=torch.float64) + offsets


def normalised(kind: str, n_views: int, rank: int, size: int) -> list[Tensor]:
    """Outputs, gradients of this rank's rows, of weight and of bias; and the averages."""
    layer = randomised((BatchNorm2d if kind == "2d" else BatchNorm1d)(5)).double()
    layer.views = n_views
    x, grad = (
        torch.cat([rows(SHAPES[kind], first + view).chunk(size)[rank] for view in range(n_views)])
        for first in (0, 5)
    )
    y = layer(x.requires_grad_())
    y.backward(grad)
    return [
        y.detach(),
        x.grad,
        layer.weight.grad,
        layer.bias.grad,
        layer.running_mean,
        layer.running_var,
    ]


def a_rank(rank: int, size: int, port: int, folder: Path, cases: dict[str, Case]) -> None:
    """Of `size` processes; it saves what it found. In the end one of four fails while the others wait for it."""
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
    }
    os.environ |= {name: str(value) for name, value in address.items()}
    torch.set_num_threads(1)
    ranks, found = Distributed(os.environ), {}

    def make() -> tuple[int, Path]:
        found["made"] = True
        return rank, folder

    try:
        with ranks.process_group(CPU):
            found["shared"] = ranks.from_rank0(make)
            found["answers"] = [
                ranks.any_rank(question == 3 and rank == size - 1) for question in range(6)
            ]
            for name, case in cases.items():
                found[name] = trained(case, rank, size)
                torch.compiler.reset()
            for kind in SHAPES:
                found |= {
                    f"{kind} {n_views}": normalised(kind, n_views, rank, size) for n_views in (1, 2)
                }
            torch.save(found, folder / f"{rank}.pt")
            if size == 4:
                assert rank != 2, "this one"
                dist.all_reduce(torch.zeros(1))
            ranks.any_rank(True)  # the answer still travels
    except (AssertionError, ConnectionError) as error:
        (folder / f"{rank}.failed").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from None
    assert not dist.is_initialized()


def launch(folders: dict[int, Path], cases: dict[int, dict[str, Case]]) -> None:
    """All ranks of all runs, forked from here (imports take longer than most of the rest); and how they ended."""
    fork, processes = torch.multiprocessing.get_context("fork"), {}
    for size, folder in folders.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(size):
            process = fork.Process(target=a_rank, args=(rank, size, port, folder, cases[size]))
            process.start()
            processes[folder / f"{rank}.status"] = process
    end = time.monotonic() + 600
    for status, process in processes.items():
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join()
        status.write_text(str(process.exitcode))


class Run(NamedTuple):
    folder: Path
    statuses: list[str]
    found: list[Found]  # of each rank


def run(cases: dict[int, dict[str, Case]], factory: pytest.TempPathFactory) -> dict[int, Run]:
    """By number of ranks. This process has used its threads, and cannot fork; a fresh one can."""
    folders = {size: factory.mktemp(f"ranks{size}-") for size in cases}
    launcher = torch.multiprocessing.get_context("spawn").Process(
        target=launch, args=(folders, cases)
    )
    launcher.start()
    for name in {name for some in cases.values() for name in some}:
        alone(name)  # meanwhile
    launcher.join()

    def files(folder: Path, suffix: str) -> list[Path]:
        return sorted(folder.glob(f"*.{suffix}"))

    return {
        size: Run(
            folder,
            [file.read_text() for file in files(folder, "status")],
            [torch.load(file, weights_only=False) for file in files(folder, "pt")],
        )
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    return run({2: CASES | VARIANTS, 4: CASES}, tmp_path_factory)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_as_alone(run: Run, name: str, tolerance: float) -> None:
    expected, (first, *rest) = alone(name), [found[name] for found in run.found]
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=tolerance, atol=0)
    for key, value in expected["state"].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            first["state"][key], value, rtol=0, atol=tolerance * scale, msg=f"{name}: {key}"
        )
        assert all(torch.equal(other["state"][key], first["state"][key]) for other in rest), (
            "ranks drift apart"
        )
    assert len(run.found) == len(run.statuses)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_same_global_batches_give_the_same_run_on_any_number_of_ranks(
    runs: dict[int, Run], size: int, name: str
) -> None:
    check_as_alone(runs[size], name, 1e-5 if name == "float32" else 1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_does_each_way_of_running_the_network(runs: dict[int, Run], name: str) -> None:
    check_as_alone(runs[2], name, 1e-12)
    assert [found[name]["graphs"] for found in runs[2].found] == [2 * (name == "traced")] * 2


@pytest.mark.slow
def test_so_does_the_compiled_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_as_alone(run({2: COMPILED}, tmp_path_factory)[2], "compiled", 1e-10)


def plain(made: nn.Module) -> nn.Module:
    """With torch's own batch norms."""
    for name, module in list(made.named_modules()):
        if isinstance(module, (BatchNorm1d, BatchNorm2d)):
            own = (nn.BatchNorm2d if isinstance(module, BatchNorm2d) else nn.BatchNorm1d)(
                module.num_features
            ).double()
            own.load_state_dict(module.state_dict())
            made.set_submodule(name, own)
    return made


@pytest.mark.parametrize("name", ["dxd", "nxn"])
def test_that_run_is_the_method_written_out(name: str) -> None:
    """Batch norm by torch, the cross-correlation matrix, autograd, and LARS parameter by parameter."""
    reference, losses = plain(network(CASES[name])), []
    momenta = [torch.zeros_like(p) for p in reference.parameters()]
    for step in range(STEPS):
        c = plain_c(
            *(
                reference.projector(reference.backbone(view))
                for view in views(BATCH, 16, step, torch.float64)
            )
        )
        diagonal = c.diagonal()
        loss = (diagonal - 1).square().sum() + LAMBD * (c.square().sum() - diagonal.square().sum())
        grads = torch.autograd.grad(loss, list(reference.parameters()))
        losses.append(loss.detach())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(reference.parameters(), grads, strict=True)):
                lr = RATES[step][p.ndim == 1]
                new, momenta[i] = lars_by_hand(
                    p, g, momenta[i], lr, WEIGHT_DECAY, ETA, MOMENTUM, clip=False
                )
                p.copy_(new)
    found = alone(name)
    torch.testing.assert_close(found["losses"], torch.stack(losses), rtol=1e-10, atol=0)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(
            found["state"][key], value, rtol=0, atol=1e-10 * float(value.abs().max()), msg=key
        )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_batch_norm_over_ranks_is_torchs_over_the_global_batch(
    runs: dict[int, Run], kind: str, n_views: int, size: int
) -> None:
    layer = randomised((nn.BatchNorm2d if kind == "2d" else nn.BatchNorm1d)(5)).double()
    x = [rows(SHAPES[kind], view).requires_grad_() for view in range(n_views)]
    y = [layer(view) for view in x]
    torch.autograd.backward(y, [rows(SHAPES[kind], 5 + view) for view in range(n_views)])
    found = [found[f"{kind} {n_views}"] for found in runs[size].found]
    for rank, (output, grad, _, _, *averages) in enumerate(found):
        mine = [
            torch.cat([t.chunk(size)[rank] for t in whole])
            for whole in (y, [view.grad for view in x])
        ]
        torch.testing.assert_close([output, grad], mine, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            averages, [layer.running_mean, layer.running_var], rtol=1e-12, atol=0
        )
    of_parameters = [sum(grads) for grads in zip(*(of_rank[2:4] for of_rank in found), strict=True)]
    torch.testing.assert_close(
        of_parameters, [layer.weight.grad, layer.bias.grad], rtol=1e-11, atol=1e-11
    )


# ── what else they say to each other ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_what_the_first_has_made_and_hear_a_yes_one_call_later(
    runs: dict[int, Run], size: int
) -> None:
    folder, _, found = runs[size]
    assert [of_rank.get("made", False) for of_rank in found] == [True] + [False] * (size - 1)
    assert [of_rank["shared"] for of_rank in found] == [(0, folder)] * size
    assert [of_rank["answers"] for of_rank in found] == [[False] * 4 + [True, False]] * size


def test_ranks_that_have_finished_leave_even_while_an_answer_travels(runs: dict[int, Run]) -> None:
    assert runs[2].statuses == ["0", "0"]
    assert not list(runs[2].folder.glob("*.failed"))


def test_where_one_rank_fails_all_do_and_it_alone_says_why(runs: dict[int, Run]) -> None:
    folder, statuses, _ = runs[4]
    assert statuses == ["3"] * 4
    words = [(folder / f"{rank}.failed").read_text() for rank in range(4)]
    assert words.pop(2) == "AssertionError: this one"
    assert set(words) == {
        "ConnectionError: another rank has failed; its error message has the reason"
    }


def test_a_world_of_one_needs_no_group() -> None:
    ranks = Distributed({})
    with ranks.process_group(CPU):
        assert not dist.is_initialized()
        assert ranks.from_rank0(lambda: 7) == 7
        assert [ranks.any_rank(mine) for mine in (False, True, False)] == [False, True, False]
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, ranks.is_rank0) == (
        0,
        1,
        0,
        1,
        True,
    )
    second = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    ranks = Distributed(second)
    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, ranks.is_rank0) == (
        9,
        16,
        1,
        8,
        False,
    )
