"""Several ranks train a network exactly as one does; and the collectives of `Distributed`.

Starting processes takes long, so all of them are started once: each rank runs all cases and saves
its results, which the tests then compare.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
from tests.helpers.networks import make_views, randomize
from tests.helpers.reference import LarsSettings, cross_correlation, lars_step

CPU = torch.device("cpu")
BATCH = 16
STEPS = 20
LAMBD = 0.0051
LARS_SETTINGS = LarsSettings(weight_decay=0.01, eta=0.02, momentum=0.9)
# (weights, biases) at each step
FACTORS = [learning_rate_factor(step, STEPS, warmup_steps=4) for step in range(STEPS)]
LEARNING_RATES = [(factor, 0.004 * factor) for factor in FACTORS]

SIZES = [2, 4]  # numbers of ranks


class Case(NamedTuple):
    """A network and how it is run. By default, it has each kind of block of a ResNet-18 once."""

    projector: str = "24-24-16"  # below width 32, the D x D form of the loss is chosen
    blocks: tuple[int, ...] = (1, 1, 1, 1)  # in each stage
    steps: range = range(STEPS)
    dtype: torch.dtype = torch.float64
    one_pass: bool = False
    recompute: bool = False
    compiler_backend: str | None = None


DXD = Case()
NXN = Case("96-96-96", blocks=(1, 1, 0, 0))
CASES = {
    "dxd": DXD,
    "nxn": NXN,
    # This step's batch has no activation so close to 0 that rounding decides if a ReLU passes it.
    "float32": NXN._replace(dtype=torch.float32, steps=range(1, 2)),
}
VARIANTS = {  # only on two ranks
    "one pass": DXD._replace(one_pass=True, steps=range(4)),
    "recomputed": DXD._replace(recompute=True, steps=range(4)),
    "traced": NXN._replace(
        one_pass=True,
        recompute=True,
        compiler_backend="aot_eager",
        blocks=(1, 0, 0, 0),
        steps=range(3),
    ),
}
COMPILED = {
    "compiled": NXN._replace(
        one_pass=True, compiler_backend="inductor", blocks=(1, 0, 0, 0), steps=range(4)
    )
}


class TrainingResult(NamedTuple):
    losses: Tensor
    state: dict[str, Tensor]
    graph_count: int


class RankResult(NamedTuple):
    """What one rank saves."""

    made_shared_value: bool
    shared_value: tuple[int, Path]
    any_rank_answers: list[bool]
    all_ranks_answers: list[bool]
    trained: dict[str, TrainingResult]
    # By kind of layer and number of views: outputs, gradients of this rank's rows, of weight and of
    # bias, and both running averages.
    batch_norms: dict[tuple[str, int], list[Tensor]]


def make_network(case: Case) -> BarlowTwins:
    backbone = build_backbone("resnet18", 8, small_stem=True)
    stages = backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4
    for stage, blocks in zip(stages, case.blocks, strict=True):
        del stage[blocks:]
    stage_count = sum(len(stage) > 0 for stage in stages)
    backbone.out_features = 8 * 2 ** (stage_count - 1)
    network = BarlowTwins(backbone, case.projector, LAMBD, one_pass=case.one_pass)
    randomize(network).to(case.dtype)
    if case.recompute:
        network.backbone.recompute_activations()
    return network


def train(case: Case, rank: int = 0, size: int = 1) -> TrainingResult:
    network = make_network(case)
    with torch.no_grad():
        for p in network.parameters():
            p += rank  # all ranks must start with the weights of rank 0
    graphs = CompileCounterWithBackend(case.compiler_backend or "eager")
    forward = wrap(network, graphs if case.compiler_backend else None)
    groups = parameter_groups(network, LARS_SETTINGS.weight_decay)
    optimizer = LARS(groups, momentum=LARS_SETTINGS.momentum, eta=LARS_SETTINGS.eta)
    losses = []
    for step in case.steps:
        for group, lr in zip(optimizer.param_groups, LEARNING_RATES[step], strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        a, b = make_views(BATCH, 16, step, case.dtype)
        loss = forward(a.chunk(size)[rank], b.chunk(size)[rank]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return TrainingResult(torch.stack(losses), state, graphs.frame_count)


def wrap(network: BarlowTwins, backend: CompileCounterWithBackend | None) -> nn.Module:
    """`compile_and_wrap`, with another backend of torch.compile, and failing on a graph break."""
    if backend is None:
        return compile_and_wrap(CPU, network, None)
    original = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "compile",
            lambda function, mode: original(function, backend=backend, fullgraph=True),
        )
        return compile_and_wrap(CPU, network, "default")


@cache
def train_alone(name: str) -> TrainingResult:
    """A case on one rank, not compiled."""
    return train((CASES | VARIANTS | COMPILED)[name]._replace(compiler_backend=None))


# ── what a rank does ─────────────────────────────────────────────────────────────────────────────

BATCH_NORM_SHAPES = {"1d": (8, 5), "2d": (8, 5, 3, 2)}


def make_rows(kind: str, seed: int) -> Tensor:
    """[B, C, ...] of one view in the global batch; each channel has another mean."""
    shape = BATCH_NORM_SHAPES[kind]
    generator = torch.Generator().manual_seed(seed)
    offsets = 10 * torch.arange(shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (1 + seed) * torch.randn(shape, generator=generator, dtype=torch.float64) + offsets


def run_batch_norm(kind: str, n_views: int, rank: int, size: int) -> list[Tensor]:
    layer_class = BatchNorm2d if kind == "2d" else BatchNorm1d
    layer = randomize(layer_class(5)).double()
    layer.views = n_views

    def own_rows(first_seed: int) -> Tensor:
        views = [make_rows(kind, first_seed + view) for view in range(n_views)]
        return torch.cat([view.chunk(size)[rank] for view in views])

    x = own_rows(0).requires_grad_()
    y = layer(x)
    y.backward(own_rows(5))
    averages = [layer.running_mean, layer.running_var]
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *averages]


def run_cases(distributed: Distributed, cases: dict[str, Case], folder: Path) -> RankResult:
    rank, size = distributed.rank, distributed.size
    makers = []

    def make_shared_value() -> tuple[int, Path]:
        makers.append(rank)
        return rank, folder

    shared_value = distributed.from_rank0(make_shared_value)
    is_last = rank == size - 1
    any_rank_answers = [distributed.any_rank(call == 3 and is_last) for call in range(6)]
    all_ranks_answers = [distributed.all_ranks(value) for value in (True, is_last, False)]
    trained = {}
    for name, case in cases.items():
        trained[name] = train(case, rank, size)
        torch.compiler.reset()
    return RankResult(
        made_shared_value=bool(makers),
        shared_value=shared_value,
        any_rank_answers=any_rank_answers,
        all_ranks_answers=all_ranks_answers,
        trained=trained,
        batch_norms={
            (kind, n_views): run_batch_norm(kind, n_views, rank, size)
            for kind in BATCH_NORM_SHAPES
            for n_views in (1, 2)
        },
    )


def run_rank(rank: int, size: int, port: int, folder: Path, cases: dict[str, Case]) -> None:
    """The main function of a process. At the end, rank 2 of 4 fails while the others wait."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    os.environ.update(environment)
    torch.set_num_threads(1)
    distributed = Distributed(os.environ)
    try:
        with distributed.process_group(CPU):
            torch.save(run_cases(distributed, cases, folder), folder / f"{rank}.pt")
            if size == 4:
                assert rank != 2, "the reason"
                dist.all_reduce(torch.zeros(1))
            distributed.any_rank(True)  # its answer is still on the way when the block ends
    except (AssertionError, ConnectionError) as error:
        (folder / f"{rank}.failed").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from None
    assert not dist.is_initialized()


def launch(folders: dict[int, Path], cases: dict[int, dict[str, Case]]) -> None:
    """Run all ranks of all sizes at once, and save their exit codes.

    They are forked, because their imports would take longer than most of their work.
    """
    fork = torch.multiprocessing.get_context("fork")
    processes = {}
    for size, folder in folders.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(size):
            process = fork.Process(target=run_rank, args=(rank, size, port, folder, cases[size]))
            process.start()
            processes[folder / f"{rank}.exitcode"] = process
    deadline = time.monotonic() + 600
    for file, process in processes.items():
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
        file.write_text(str(process.exitcode))


class Run(NamedTuple):
    """All ranks of one size."""

    folder: Path
    exit_codes: list[str]
    results: list[RankResult]


def run(cases: dict[int, dict[str, Case]], factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Run cases by number of ranks.

    This process has used its threads, so that it must not fork. A new process does it.
    """
    folders = {size: factory.mktemp(f"ranks{size}-") for size in cases}
    spawn = torch.multiprocessing.get_context("spawn")
    launcher = spawn.Process(target=launch, args=(folders, cases))
    launcher.start()
    for name in set().union(*cases.values()):
        train_alone(name)  # meanwhile
    launcher.join()

    runs = {}
    for size, folder in folders.items():
        exit_codes = [file.read_text() for file in sorted(folder.glob("*.exitcode"))]
        files = sorted(folder.glob("*.pt"))
        results = [torch.load(file, weights_only=False) for file in files]
        runs[size] = Run(folder, exit_codes, results)
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    return run({2: CASES | VARIANTS, 4: CASES}, tmp_path_factory)


# ── training ─────────────────────────────────────────────────────────────────────────────────────


def check_state(
    state: dict[str, Tensor], expected: Iterable[tuple[str, Tensor]], tolerance: float
) -> None:
    for name, value in expected:
        largest = float(value.abs().max())
        torch.testing.assert_close(state[name], value, rtol=0, atol=tolerance * largest, msg=name)


def check_same_as_alone(run: Run, name: str, tolerance: float) -> None:
    assert len(run.results) == len(run.exit_codes), "a rank has saved nothing"
    expected = train_alone(name)
    first, *others = [result.trained[name] for result in run.results]
    torch.testing.assert_close(first.losses, expected.losses, rtol=tolerance, atol=0)
    check_state(first.state, expected.state.items(), tolerance)
    for other in others:
        for key, value in first.state.items():
            assert torch.equal(other.state[key], value), f"ranks differ in {key}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_gives_the_same_run(runs: dict[int, Run], size: int, name: str) -> None:
    check_same_as_alone(runs[size], name, 1e-5 if name == "float32" else 1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_way_of_running_the_network_gives_the_same_run(
    runs: dict[int, Run], name: str
) -> None:
    check_same_as_alone(runs[2], name, 1e-12)
    graph_counts = [result.trained[name].graph_count for result in runs[2].results]
    assert graph_counts == ([2, 2] if name == "traced" else [0, 0])


@pytest.mark.slow
def test_the_compiled_network_gives_the_same_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    check_same_as_alone(run({2: COMPILED}, tmp_path_factory)[2], "compiled", 1e-10)


def with_torchs_batch_norm(network: BarlowTwins) -> BarlowTwins:
    for name, module in list(network.named_modules()):
        if isinstance(module, (BatchNorm1d, BatchNorm2d)):
            torchs = nn.BatchNorm2d if isinstance(module, BatchNorm2d) else nn.BatchNorm1d
            layer = torchs(module.num_features).double()
            layer.load_state_dict(module.state_dict())
            network.set_submodule(name, layer)
    return network


@pytest.mark.parametrize("name", ["dxd", "nxn"])
def test_the_run_follows_the_formulas_of_the_paper(name: str) -> None:
    """With torch's batch norm, the cross-correlation matrix, autograd, and LARS written out."""
    network = with_torchs_batch_norm(make_network(CASES[name]))
    momenta = [torch.zeros_like(p) for p in network.parameters()]
    losses = []
    for step in range(STEPS):
        a, b = make_views(BATCH, 16, step, torch.float64)
        c = cross_correlation(
            network.projector(network.backbone(a)), network.projector(network.backbone(b))
        )
        diagonal = c.diagonal()
        loss = (diagonal - 1).square().sum() + LAMBD * (c.square().sum() - diagonal.square().sum())
        grads = torch.autograd.grad(loss, list(network.parameters()))
        losses.append(loss.detach())
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(network.parameters(), grads, strict=True)):
                lr = LEARNING_RATES[step][p.ndim == 1]
                updated, momenta[i] = lars_step(p, g, momenta[i], lr, LARS_SETTINGS)
                p.copy_(updated)

    ours = train_alone(name)
    torch.testing.assert_close(ours.losses, torch.stack(losses), rtol=1e-10, atol=0)
    check_state(ours.state, network.state_dict().items(), 1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_views", [1, 2])
@pytest.mark.parametrize("kind", BATCH_NORM_SHAPES)
def test_batch_norm_over_ranks_is_torchs_over_the_global_batch(
    runs: dict[int, Run], kind: str, n_views: int, size: int
) -> None:
    layer = randomize((nn.BatchNorm2d if kind == "2d" else nn.BatchNorm1d)(5)).double()
    x = [make_rows(kind, view).requires_grad_() for view in range(n_views)]
    y = [layer(view) for view in x]
    torch.autograd.backward(y, [make_rows(kind, 5 + view) for view in range(n_views)])

    results = [result.batch_norms[kind, n_views] for result in runs[size].results]
    for rank, (output, grad, _, _, *averages) in enumerate(results):
        expected_output = torch.cat([view.chunk(size)[rank] for view in y])
        expected_grad = torch.cat([view.grad.chunk(size)[rank] for view in x])
        torch.testing.assert_close(output, expected_output, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)
        expected_averages = [layer.running_mean, layer.running_var]
        torch.testing.assert_close(averages, expected_averages, rtol=1e-12, atol=0)
    weight_grad = sum(result[2] for result in results)
    bias_grad = sum(result[3] for result in results)
    torch.testing.assert_close(weight_grad, layer.weight.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(bias_grad, layer.bias.grad, rtol=1e-11, atol=1e-11)


# ── collectives ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES)
def test_from_rank0_calls_the_function_on_rank_0_only(runs: dict[int, Run], size: int) -> None:
    results = runs[size].results
    assert [result.made_shared_value for result in results] == [True] + [False] * (size - 1)
    assert [result.shared_value for result in results] == [(0, runs[size].folder)] * size


@pytest.mark.parametrize("size", SIZES)
def test_any_rank_answers_one_call_later_on_all_ranks(runs: dict[int, Run], size: int) -> None:
    answers = [result.any_rank_answers for result in runs[size].results]
    assert answers == [[False] * 4 + [True, False]] * size


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_is_true_only_if_all_are(runs: dict[int, Run], size: int) -> None:
    answers = [result.all_ranks_answers for result in runs[size].results]
    assert answers == [[True, False, False]] * size


def test_ranks_can_leave_while_an_answer_is_on_the_way(runs: dict[int, Run]) -> None:
    assert runs[2].exit_codes == ["0", "0"]
    assert not list(runs[2].folder.glob("*.failed"))


def test_if_one_rank_fails_all_fail_and_only_it_reports_the_reason(runs: dict[int, Run]) -> None:
    run = runs[4]
    assert run.exit_codes == ["3"] * 4
    messages = [(run.folder / f"{rank}.failed").read_text() for rank in range(4)]
    assert messages.pop(2) == "AssertionError: the reason"
    assert set(messages) == {
        "ConnectionError: another rank has failed; its error message has the reason"
    }


def test_a_single_process_needs_no_process_group() -> None:
    distributed = Distributed({})
    with distributed.process_group(CPU):
        assert not dist.is_initialized()
        assert distributed.from_rank0(lambda: 7) == 7
        for value in (False, True, False):
            assert distributed.any_rank(value) is value
            assert distributed.all_ranks(value) is value


def test_ranks_and_sizes_come_from_the_environment() -> None:
    single = Distributed({})
    assert (single.rank, single.size) == (0, 1)
    assert (single.local_rank, single.local_size) == (0, 1)
    assert single.is_rank0

    second_machine = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
    }
    other = Distributed(second_machine)
    assert (other.rank, other.size) == (9, 16)
    assert (other.local_rank, other.local_size) == (1, 8)
    assert not other.is_rank0
