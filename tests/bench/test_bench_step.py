"""`python -m bench step`: what it compares is the same step, and what it says of it is what it has measured."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import interleaved, record, reference_step, report, rooflines, step
from bench.interleaved import Entrant, contest
from bench.record import Rates, Step
from bench.step import AUTHORS, FUSED, GRAM, MATRIX, MEMORY, MULTIPLY
from experiment.config import DataConfig, ModelConfig, OptimConfig, Pretrain
from experiment.console import Console
from experiment.presets import PRESETS
from model import LARS, BarlowTwins, build_backbone, parameter_groups

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Pretrain(
    DataConfig(size=32), ModelConfig("resnet18", 4, projector="16-16"), OptimConfig(batch_size=8)
)


def nothing(*reading: object) -> None: ...


# ── the authors' step ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_authors_step_and_ours_come_to_the_same_weights(backbone: str, one_pass: bool) -> None:
    """In float64, over two steps: momentum takes part in the second."""
    config = ModelConfig(backbone, 8, projector="32-32-24")  # type: ignore[arg-type]
    torch.manual_seed(0)
    theirs = reference_step.Network(config).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)  # or residual branches would not count
    ours = BarlowTwins(
        build_backbone(backbone, 8), "32-32-24", config.lambd, one_pass=one_pass
    ).double()
    ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if not n.startswith("bn.")})
    before = {name: p.clone() for name, p in ours.named_parameters()}
    views = [torch.randn(6, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    ours.to(memory_format=torch.channels_last)
    for forward, optimizer in (
        (theirs, reference_step.LARS(parameter_groups(theirs, 1e-3), 0.3, 0.9, 0.01)),
        (lambda a, b: ours(a, b).loss, LARS(parameter_groups(ours, 1e-3), 0.3, 0.9, 0.01)),
    ):
        work = step.training(forward, optimizer, views, torch.float64)
        work(), work()
    found = dict(theirs.named_buffers()) | dict(theirs.named_parameters())
    for name, value in itertools.chain(ours.named_parameters(), ours.named_buffers()):
        torch.testing.assert_close(value, found[name], rtol=1e-9, atol=1e-9, msg=name)
    assert all(not torch.equal(value, before[name]) for name, value in ours.named_parameters())


def test_their_network_has_torchs_layers_and_its_memory_is_not_channels_last() -> None:
    network = reference_step.Network(TINY.model)
    kinds = {
        type(module)
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert kinds == {nn.BatchNorm1d, nn.BatchNorm2d}
    assert all(p.is_contiguous() for p in network.parameters())


def test_their_loss_is_the_sum_over_all_elements() -> None:
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    c = [[float(sum(a[n, i] * b[n, j] for n in range(5)) / 5) for j in range(7)] for i in range(7)]
    by_hand = sum(
        (c[i][i] - 1) ** 2 + 0.3 * sum(c[i][j] ** 2 for j in range(7) if j != i) for i in range(7)
    )
    assert float(reference_step.loss(a, b, 0.3)) == pytest.approx(by_hand, rel=1e-12)


# ── turns ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def entrant(name: str, work: Callable[[], object] = nothing) -> Entrant:
    return Entrant(name, torch.float32, lambda: work)


def test_the_ratio_is_the_median_of_paired_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1.0, 0.5, 2.0, 4.0, 3.0, 1.0])  # theirs, ours, theirs, ours, ...
    monkeypatch.setattr(interleaved, "_seconds", lambda *given: next(taken))
    theirs, ours = contest([entrant("theirs"), entrant("ours")], 8, 3, 1, CPU, nothing, [])
    assert (theirs.ratio, ours.ratio) == (
        1,
        2,
    )  # of 2, 0.5 and 3; the ratio of the medians is 2 as well, so:
    assert theirs.rates.images_per_s == [8, 4, 8 / 3]
    assert ours.rates.images_per_s == [16, 2, 8]
    assert ours.ms == 1000 * 8 / 8
    assert ours.against == "theirs"


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_what_does_not_fit_is_reported_and_the_others_are_measured() -> None:
    calls = itertools.count()

    def at_its_fourth_call() -> None:
        if next(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    skipped: list[str] = []
    entrants = [
        entrant("first", out_of_memory),
        entrant("second", at_its_fourth_call),
        entrant("third"),
    ]
    (found,) = contest(entrants, 8, 2, 2, CPU, nothing, skipped)
    assert skipped == ["first, batch 8: out of memory", "second, batch 8: out of memory"]
    assert (found.name, found.ratio, len(found.rates.images_per_s)) == ("third", None, 2)


def test_any_other_error_ends_it() -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        contest([entrant("broken", broken)], 8, 1, 1, CPU, nothing, [])


# ── ceilings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_traffic_is_what_others_have_found_for_an_h200() -> None:
    """Its memory copies at 4.3 TB/s: 4,050 images/s operation by operation and 4,950 with ReLUs fused are known."""
    network = ModelConfig()
    single, fused = (
        4.3e12 / rooflines.step_traffic(network, 224, torch.bfloat16, fused)
        for fused in (False, True)
    )
    assert single == pytest.approx(step.KNOWN["H200"][0], rel=0.12)
    assert fused == pytest.approx(step.KNOWN["H200"][1], rel=0.12)


def test_traffic_of_batch_norm_with_relu_by_hand() -> None:
    x, grad = torch.zeros(64, 8, 16, 16, requires_grad=True), torch.ones(64, 8, 16, 16)
    found = {}
    for fused in (False, True):
        with rooflines._Traffic(fused) as counter:
            y = torch.relu_(torch.nn.functional.batch_norm(x, None, None, training=True))
            torch.autograd.grad(y, x, grad)
        found[fused] = counter.elements / x.numel()
    # Read for the moments, read and written to normalise; so too in backward, where both its input and the gradient are
    # read. ReLU reads one and writes one, and in backward reads two and writes one.
    norm, relu = (1 + 2) + (2 + 3), 2 + 3
    assert found == pytest.approx({False: norm + relu, True: norm}, rel=1e-3)


def test_what_is_known_is_of_the_papers_network_alone() -> None:
    paper = PRESETS["imagenet-1000e"]()
    assert list(step.known_limits(paper.model, 224, "NVIDIA H200").values()) == [4050, 4950, 8600]
    assert not step.known_limits(paper.model, 224, "NVIDIA H100 80GB HBM3")
    assert not step.known_limits(paper.model, 224, None)
    assert not step.known_limits(paper.model, 96, "NVIDIA H200")
    assert not step.known_limits(PRESETS["imagenet-100e"]().model, 224, "NVIDIA H200")


# ── verdict ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps_of(*rates: float, batch_size: int = 128) -> list[Step]:
    names = (AUTHORS, "+ our loss and LARS", "+ channels-last", "the same, CUDA graphs")
    return [
        Step(name, AUTHORS, "float32", batch_size, Rates([rate, rate]), rate / rates[0], None)
        for name, rate in zip(names, rates, strict=True)
    ]


BOUNDS = {
    f"{what}, float32": bound
    for what, bound in ((MULTIPLY, 1000.0), (MEMORY, 500.0), (FUSED, 800.0))
}


def test_the_verdict_says_what_binds_and_what_the_gain_is_made_of() -> None:
    loss = [
        Step(name, MATRIX, "float32", 256, Rates([1.0]), r, gib)
        for name, r, gib in ((MATRIX, 1, 4.0), (GRAM, 25, 0.2))
    ]
    binds, known, gain, of_loss = step.verdict(
        [*steps_of(100, 110, 220, 250), *loss], BOUNDS, {"alone": 2500}, 16384
    )
    assert binds.startswith(
        "Memory traffic binds: in float32 this machine's memory allows 500 images/s"
    )
    assert "(the same, CUDA graphs, batch 128) makes 250: 50%, 31% and 25% of these" in binds
    assert "10% of 2,500 (alone)" in known
    assert (
        "1.10 (our loss and LARS) x 2.00 (channels-last) = 2.20; the same, CUDA graphs 2.50."
        in gain
    )
    assert (
        of_loss
        == "For N 256 and D 16384 our loss takes 1/25 of the time of the authors' form and 1/20 of its memory."
    )
    (binds, _) = step.verdict(
        steps_of(100, 110, 220, 250), BOUNDS | {f"{MULTIPLY}, float32": 400.0}, {}, 16384
    )
    assert binds.startswith("Multiplication binds")


def test_where_nothing_of_the_authors_fits_there_is_no_gain() -> None:
    ours = [s for s in steps_of(100, 110, 220, 250) if s.name != AUTHORS]
    without = [Step(s.name, AUTHORS, "float32", 128, s.rates, None, None) for s in ours]
    assert len(step.verdict(without, BOUNDS, {}, 16384)) == 1
    assert step.verdict([], BOUNDS, {}, 16384) == []


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_is_measured_recorded_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a size at which nothing takes long, and with a compiler that compiles nothing."""
    monkeypatch.setitem(PRESETS, "demo", lambda: TINY)
    monkeypatch.setattr(step, "QUICK_LOSS", (8, 64))
    monkeypatch.setattr(step, "memory_of_loss", lambda form, n, d: 1.0 if form == GRAM else 30.0)
    monkeypatch.setattr(rooflines, "_GPU_BLOCK", 1 << 20)
    monkeypatch.setattr(rooflines, "_SECONDS", 0.01)
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    path, trace = tmp_path / "step.json", tmp_path / "trace.json.gz"
    arguments = [
        "--quick",
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "8",
        "--json",
        str(path),
        "--trace",
        str(trace),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # among other tests' processes, several would wait for each other
    with Console() as console:
        assert step.main(arguments, console) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    result = record.read(path)
    assert (
        result.command
        == "python -m bench step --quick --device cpu --batch-size 4 8 --json step.json --trace trace.json.gz"
    )
    names = [AUTHORS, "+ our loss and LARS", "+ channels-last", "+ compiled", "+ both in one pass"]
    assert [(s.batch_size, s.name) for s in result.steps] == [
        *itertools.product((4, 8), names),
        *itertools.product((8,), (MATRIX, GRAM)),
    ]
    assert all(len(s.rates.images_per_s) == 2 for s in result.steps)
    assert all(s.ratio == 1 for s in result.steps if s.name == s.against)
    assert [s.memory_gib for s in result.steps] == [None] * 10 + [30, 1]
    assert result.bounds.keys() == BOUNDS.keys()
    assert result.settings["skipped"] == []
    assert [sentence for sentence in result.verdict if sentence not in said] == []
    table = report.rendered(result)
    assert all(f"| {name} | 8 |" in table for name in (*names, MATRIX, GRAM))
    assert all(sentence in table for sentence in result.verdict)
    assert trace.stat().st_size > 1000
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() == table
    result.write(tmp_path / "again.json")
    assert record.read(tmp_path / "again.json") == result


def test_what_an_earlier_record_does_not_have_is_not_missed(tmp_path: Path) -> None:
    old = json.loads((ROOT / "bench" / "results" / "convert-2cores.json").read_text())
    assert "steps" not in old
    assert record.read(ROOT / "bench" / "results" / "convert-2cores.json").steps == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns", "0"], "--turns is 0: it must be at least 1"),
        (["--steps", "0"], "--steps is 0"),
        (["--batch-size", "8", "1"], "--batch-size is 1: it must be at least 2"),
        (["--json", "/"], "--json / cannot be written"),
        (["--trace", "no/such/folder/x.gz"], "--trace no/such/folder/x.gz cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step.main(arguments, None)  # type: ignore[arg-type]


def test_our_ways_are_what_train_py_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, as far as one without can tell; and on one that cannot compile."""
    monkeypatch.setattr(step.model, "choose_precision", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(step.model, "choose_compilation", lambda mode, device: (mode, "compiled"))
    ways, _ = step.our_ways(torch.device("cuda"), quick=False)
    assert [way.dtype for way in ways] == [torch.float16] * 2 + [torch.bfloat16] * 5
    assert [way.compile_mode for way in ways] == [None] * 3 + ["default"] * 2 + [
        "max-autotune-no-cudagraphs",
        "reduce-overhead",
    ]
    assert [way.one_pass for way in ways] == [False] * 4 + [True] * 3
    assert [way.layout for way in ways] == [torch.contiguous_format] + [torch.channels_last] * 6
    monkeypatch.setattr(
        step.model, "choose_compilation", lambda mode, device: (None, "not compiled, since")
    )
    assert len(step.our_ways(torch.device("cuda"), quick=False)[0]) == 3


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_command_as_it_is_typed(tmp_path: Path) -> None:
    """Compiles two programs: minutes."""
    command = [sys.executable, "-m", "bench", "step", "--quick", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = record.read(tmp_path / "a.json")
    assert [s.name for s in result.steps][-3:] == ["+ both in one pass", MATRIX, GRAM]
    assert all(s.name in done.stdout for s in result.steps)


@pytest.mark.slow
def test_our_loss_takes_a_tenth_of_time_and_memory() -> None:
    n, d = step.LOSS
    forms = [
        Entrant(form, torch.float32, lambda form=form: step.loss_work(form, n, d, CPU))
        for form in (MATRIX, GRAM)
    ]
    _, ours = contest(forms, n, 3, 1, CPU, nothing, [])
    assert ours.ratio is not None
    assert ours.ratio >= 10
    assert step.memory_of_loss(GRAM, n, d) < step.memory_of_loss(MATRIX, n, d) / 10


def test_the_growth_of_a_process_is_what_the_loss_allocates() -> None:
    """Ours at N 512, D 8192: at least the two gradients and the normalised embeddings, and no D x D matrix."""
    mib = 1024 * step.memory_of_loss(GRAM, 512, 8192)
    assert 4 * 16 <= mib < 256


def test_committed_records_are_of_full_length() -> None:
    for path in (ROOT / "bench" / "results").glob("step-*.json"):
        result = record.read(path)
        assert result.settings["turns"] >= 5
        assert result.steps[0].name == AUTHORS
