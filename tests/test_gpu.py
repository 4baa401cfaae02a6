"""What only a GPU can show: the same views, batches and training there as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from pipeline import barlow_twins, open_loader, open_store
from presets import parse
from runlog import RunLog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ONE_LEVEL = 1 / 255 / 0.224  # in normalised units, of the channel with the smallest deviation


def test_batches_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    store = open_store(photos)
    cpu, gpu = (open_loader(store, barlow_twins(64), batch_size=16, device=device) for device in ("cpu", "cuda"))
    for here, there in zip(cpu.steps(1, 5), gpu.steps(1, 5), strict=True):
        assert torch.equal(here.samples, there.samples)
        assert torch.equal(here.labels, there.labels.cpu())
        for a, b in zip(here.views, there.views, strict=True):
            assert b.is_contiguous(memory_format=torch.channels_last)
            difference = (a - b.cpu()).abs()
            assert float(difference.mean()) < 0.01 * ONE_LEVEL
            assert float((difference > ONE_LEVEL).float().mean()) < 1e-3  # branch points of hue and solarisation


def test_distorted_batches_wait_for_their_stream(photos: Path) -> None:
    """The consumer reads each batch at once, while the next ones are being made on the loader's stream."""
    loader = open_loader(open_store(photos), barlow_twins(224), batch_size=20, device="cuda")
    at_once = [batch.views[0].sum().item() for batch in loader.steps(0, 6)]
    later = [batch.views[0] for batch in loader.steps(0, 6)]
    torch.cuda.synchronize()
    assert at_once == [view.sum().item() for view in later]


@pytest.mark.parametrize("options", [["--compile", "off"], ["--compile", "on"], ["--precision", "float16"]])
def test_trains_on_the_gpu_and_resumes(photos: Path, tmp_path: Path, options: list[str]) -> None:
    common = ["demo", "--data", str(photos), "--run", str(tmp_path / "run"), "--batch-size", "18", "--epochs", "6"]
    with RunLog() as log:
        assert train.main(*parse([*common, *options, "--log-steps", "1"]), log) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["loss_last"] < summary["loss_first"]
        assert summary["device"] == torch.cuda.get_device_name()
        assert train.main(*parse([*common, *options, "--resume"]), log) == 0
