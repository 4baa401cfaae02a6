"""What only a GPU can show: the same views, batches and training there as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import model
import train
from experiment.console import Console
from experiment.presets import parse
from pipeline import LoaderOptions, barlow_twins, center_view, open_loader, open_store
from tests.helpers.images import EXAMPLE_IMAGES, decoded_by_pillow, mean_difference, write_photos
from tests.helpers.stores import FixedSizeStore, decoder_of, whole_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ONE_LEVEL = 1 / 255 / 0.224  # in normalised units, of the channel with the smallest deviation


def test_batches_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    store = open_store(photos)
    cpu, gpu = (
        open_loader(
            store, barlow_twins(64), LoaderOptions(batch_size=16, decoder="cpu", device=device)
        )
        for device in ("cpu", "cuda")
    )
    for here, there in zip(cpu.steps(1, 5), gpu.steps(1, 5), strict=True):
        assert torch.equal(here.samples, there.samples)
        assert torch.equal(here.labels, there.labels.cpu())
        for a, b in zip(here.views, there.views, strict=True):
            assert b.is_contiguous(memory_format=torch.channels_last)
            difference = (a - b.cpu()).abs()
            assert float(difference.mean()) < 0.01 * ONE_LEVEL
            assert (
                float((difference > ONE_LEVEL).float().mean()) < 1e-3
            )  # branch points of hue and solarisation


def test_distorted_batches_wait_for_their_stream(photos: Path) -> None:
    """The consumer reads each batch at once, while the next ones are being made on the loader's stream."""
    loader = open_loader(
        open_store(photos), barlow_twins(224), LoaderOptions(batch_size=20, device="cuda")
    )
    at_once = [batch.views[0].sum().item() for batch in loader.steps(0, 6)]
    later = [batch.views[0] for batch in loader.steps(0, 6)]
    torch.cuda.synchronize()
    assert at_once == [view.sum().item() for view in later]


def test_batches_of_dali_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    """nvJPEG is not bit-identical to libjpeg-turbo: 1.5 levels on average. It is to itself."""
    store = open_store(photos)
    for recipe in (barlow_twins(64), center_view(64)):
        cpu, gpu, again = (
            open_loader(
                store, recipe, LoaderOptions(batch_size=16, decoder=name, device=device)
            ).steps(0, 7)
            for name, device in (("cpu", "cpu"), ("dali", "cuda"), ("auto", "cuda"))
        )
        for here, there, twin in zip(cpu, gpu, again, strict=True):
            assert torch.equal(here.samples, there.samples)
            assert torch.equal(here.labels, there.labels.cpu())
            for a, b, c in zip(here.views, there.views, twin.views, strict=True):
                assert b.is_cuda
                assert b.is_contiguous(memory_format=torch.channels_last)
                assert float((a - b.cpu()).abs().mean()) < 1.5 * ONE_LEVEL
                assert torch.equal(b, c)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dali_decodes_every_format_on_the_gpu(share: float) -> None:
    images = list(EXAMPLE_IMAGES.values())
    store = FixedSizeStore(images)
    decoder = decoder_of("dali", store, barlow_twins(24), device="cuda", hw_decoder_load=share)
    ((crops, good),) = decoder.stream([whole_images(range(len(images)))])
    assert good.all()
    assert crops.is_cuda
    for i, (name, data) in enumerate(EXAMPLE_IMAGES.items()):
        resized = decoded_by_pillow(data).resize((24, 24), Image.Resampling.BICUBIC)
        assert mean_difference(crops[0, i].cpu(), resized) <= 2, name


def test_bad_images_are_replaced_on_the_gpu(tmp_path: Path) -> None:
    """One that is found before DALI sees it, and one that DALI refuses, which costs it the batch."""
    store = open_store(write_photos(tmp_path, 26))
    good = list(
        open_loader(
            store, barlow_twins(32), LoaderOptions(batch_size=6, decoder="dali", device="cuda")
        ).epoch(0)
    )
    first, second = good[0].samples[2:4].tolist()
    Path(store.name(first)).write_bytes(b"\xff\xd8 overwritten")
    data = bytearray(Path(store.name(second)).read_bytes())
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    Path(store.name(second)).write_bytes(bytes(data))
    loader = open_loader(
        store, barlow_twins(32), LoaderOptions(batch_size=6, decoder="dali", device="cuda")
    )
    batches = list(loader.epoch(0))
    assert sorted(loader.bad) == sorted([first, second])
    for batch, before in zip(batches, good, strict=True):
        kept = (batch.samples == before.samples).cuda()
        for a, b in zip(
            batch.views, before.views, strict=True
        ):  # not to the bit: the engine's share may be another
            assert float((a[kept] - b[kept]).abs().mean()) < 1.5 * ONE_LEVEL
    again = open_loader(
        store, barlow_twins(32), LoaderOptions(batch_size=6, decoder="dali", device="cuda")
    ).epoch(0)
    for batch, twin in zip(batches, again, strict=True):
        assert torch.equal(batch.samples, twin.samples)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, twin.views, strict=True))


@pytest.mark.parametrize(
    "options", [["--compile", "off"], ["--compile", "default"], ["--precision", "float16"]]
)
def test_trains_on_the_gpu_and_resumes(photos: Path, tmp_path: Path, options: list[str]) -> None:
    common = [
        "demo",
        "--data",
        str(photos),
        "--run",
        str(tmp_path / "run"),
        "--batch-size",
        "18",
        "--epochs",
        "6",
    ]
    with Console() as console:
        assert train.main(*parse([*common, *options, "--log-steps", "1"]), console) == 0
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["loss_last"] < summary["loss_first"]
        assert summary["device"] == torch.cuda.get_device_name()
        assert train.main(*parse([*common, *options, "--resume"]), console) == 0


@pytest.mark.parametrize(
    "options", [[], ["--compile", "off"], ["--precision", "float16", "--recompute"]]
)
def test_two_deterministic_runs_on_the_gpu_are_equal_to_the_bit(
    photos: Path, tmp_path: Path, options: list[str]
) -> None:
    common = [
        "demo",
        "--data",
        str(photos),
        "--batch-size",
        "18",
        "--epochs",
        "2",
        "--deterministic",
        *options,
    ]
    try:
        with Console() as console:
            for name in ("one", "other"):
                assert train.main(*parse([*common, "--run", str(tmp_path / name)]), console) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("one", "other")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_largest_batch_of_a_dry_run_fits(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory of a step of 64 and one of 32 foretells that of a step of 128 to a tenth."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = model.BarlowTwins(model.build_backbone("resnet18"), "512-512", 0.0051).to(device)

    def step(batch: int) -> None:
        model.reset_peak_memory(device)
        network(*torch.randn(2, batch, 3, 96, 96, device=device)).loss.backward()

    step(64)
    peak = model.peak_memory(device)
    fits = model.largest_batch(device, 64, peak, lambda: step(32))
    free = 0.95 * torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    step(128)
    assert model.peak_memory(device) / 128 == pytest.approx(free / fits, rel=0.1)


def test_a_step_waits_for_nothing(photos: Path) -> None:
    """Between two lines of metrics the host only queues work: no copy to it, in LARS neither."""
    device = torch.device("cuda")
    network = model.BarlowTwins(model.build_backbone("resnet18"), "512-512", 0.0051).to(device)
    optimizer = model.LARS(model.parameter_groups(network, 1e-6), lr=0.1)
    last = model.StepGuard(network, lambda step: {}, None, 0)
    views = torch.randn(2, 8, 3, 64, 64, device=device)

    def step() -> None:
        optimizer.zero_grad()
        network(*views).loss.backward()
        with last.update(lambda: optimizer.skipped):
            optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
