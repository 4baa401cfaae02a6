"""What only a GPU can show: views, batches and training are the same there as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import model
import train
from experiment.console import Console
from experiment.presets import parse
from pipeline import (
    Loader,
    LoaderOptions,
    Recipe,
    Store,
    barlow_twins,
    center_view,
    open_loader,
    open_store,
)
from tests.helpers.images import EXAMPLE_IMAGES, decoded_by_pillow, mean_difference, write_photos
from tests.helpers.runs import read_summary, same_weights
from tests.helpers.stores import FixedSizeStore, decoder_of, whole_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# One of 255 levels in normalised units, in the channel with the smallest standard deviation.
ONE_LEVEL = 1 / 255 / 0.224


def test_batches_distorted_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    store = open_store(photos)
    cpu, gpu = (
        open_loader(
            store, barlow_twins(64), LoaderOptions(batch_size=16, decoder="cpu", device=device)
        )
        for device in ("cpu", "cuda")
    )
    for expected, batch in zip(cpu.steps(1, 5), gpu.steps(1, 5), strict=True):
        assert torch.equal(batch.samples, expected.samples)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        for a, b in zip(expected.views, batch.views, strict=True):
            assert b.is_contiguous(memory_format=torch.channels_last)
            difference = (a - b.cpu()).abs()
            assert float(difference.mean()) < 0.01 * ONE_LEVEL
            # Rounding can move a pixel across a branch of the hue, or across the threshold of
            # solarization.
            assert float((difference > ONE_LEVEL).float().mean()) < 1e-3


def test_a_batch_can_be_used_as_soon_as_it_is_returned(photos: Path) -> None:
    """Each batch is read at once, while the loader makes the next ones on its own stream."""
    loader = open_loader(
        open_store(photos), barlow_twins(224), LoaderOptions(batch_size=20, device="cuda")
    )
    read_at_once = [batch.views[0].sum().item() for batch in loader.steps(0, 6)]
    views = [batch.views[0] for batch in loader.steps(0, 6)]
    torch.cuda.synchronize()
    assert read_at_once == [view.sum().item() for view in views]


def test_batches_of_dali_on_the_gpu_are_those_of_the_cpu(photos: Path) -> None:
    """nvJPEG differs from libjpeg-turbo by 1.5 levels on average. It always returns the same."""
    store = open_store(photos)
    for recipe in (barlow_twins(64), center_view(64)):
        cpu, gpu, gpu_again = (
            open_loader(
                store, recipe, LoaderOptions(batch_size=16, decoder=decoder, device=device)
            ).steps(0, 7)
            for decoder, device in (("cpu", "cpu"), ("dali", "cuda"), ("auto", "cuda"))
        )
        for expected, batch, repeated in zip(cpu, gpu, gpu_again, strict=True):
            assert torch.equal(batch.samples, expected.samples)
            assert torch.equal(batch.labels.cpu(), expected.labels)
            views = zip(expected.views, batch.views, repeated.views, strict=True)
            for expected_view, view, repeated_view in views:
                assert view.is_cuda
                assert view.is_contiguous(memory_format=torch.channels_last)
                assert float((expected_view - view.cpu()).abs().mean()) < 1.5 * ONE_LEVEL
                assert torch.equal(view, repeated_view)


@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_dali_decodes_every_format_on_the_gpu(hw_decoder_load: float) -> None:
    images = list(EXAMPLE_IMAGES.values())
    store = FixedSizeStore(images)
    decoder = decoder_of(
        "dali", store, barlow_twins(24), device="cuda", hw_decoder_load=hw_decoder_load
    )
    ((crops, good),) = decoder.stream([whole_images(range(len(images)))])
    assert good.all()
    assert crops.is_cuda
    for i, (name, data) in enumerate(EXAMPLE_IMAGES.items()):
        resized = decoded_by_pillow(data).resize((24, 24), Image.Resampling.BICUBIC)
        assert mean_difference(crops[0, i].cpu(), resized) <= 2, name


def open_dali_loader(store: Store, recipe: Recipe) -> Loader:
    return open_loader(store, recipe, LoaderOptions(batch_size=6, decoder="dali", device="cuda"))


def test_bad_images_are_replaced_on_the_gpu(tmp_path: Path) -> None:
    """One is found before DALI decodes it. DALI rejects the other, together with its batch."""
    store = open_store(write_photos(tmp_path, 26))
    recipe = barlow_twins(32)
    good = list(open_dali_loader(store, recipe).epoch(0))
    first, second = good[0].samples[2:4].tolist()
    Path(store.name(first)).write_bytes(b"\xff\xd8 overwritten")
    data = bytearray(Path(store.name(second)).read_bytes())
    huffman_table = data.index(b"\xff\xc4") + 5
    data[huffman_table : huffman_table + 16] = b"\xff" * 16
    Path(store.name(second)).write_bytes(bytes(data))

    loader = open_dali_loader(store, recipe)
    batches = list(loader.epoch(0))
    assert sorted(loader.bad) == sorted([first, second])
    for batch, before in zip(batches, good, strict=True):
        kept = (batch.samples == before.samples).cuda()
        # Not to the bit: another part of the images may go to the GPU's JPEG engine.
        for a, b in zip(batch.views, before.views, strict=True):
            assert float((a[kept] - b[kept]).abs().mean()) < 1.5 * ONE_LEVEL

    # A loader that is opened after the images have turned bad gives the same, to the bit.
    for batch, repeated in zip(batches, open_dali_loader(store, recipe).epoch(0), strict=True):
        assert torch.equal(batch.samples, repeated.samples)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, repeated.views, strict=True))


@pytest.mark.parametrize(
    "options", [["--compile", "off"], ["--compile", "default"], ["--precision", "float16"]]
)
def test_a_run_on_the_gpu_learns_and_can_be_resumed(
    photos: Path, tmp_path: Path, options: list[str]
) -> None:
    run = tmp_path / "run"
    common = ["demo", "--data", str(photos), "--batch-size", "18", "--epochs", "6", *options]
    common += ["--run-folder", str(run)]
    with Console() as console:
        assert train.main(*parse([*common, "--log-steps", "1"]), console) == 0
        summary = read_summary(run)
        assert summary["loss_last"] < summary["loss_first"]
        assert summary["device"] == torch.cuda.get_device_name()
        assert train.main(*parse([*common, "--resume"]), console) == 0


@pytest.mark.parametrize(
    "options", [[], ["--compile", "off"], ["--precision", "float16", "--recompute"]]
)
def test_two_deterministic_runs_on_the_gpu_have_the_same_weights(
    photos: Path, tmp_path: Path, options: list[str]
) -> None:
    common = ["demo", "--data", str(photos), "--batch-size", "18", "--epochs", "2"]
    common += ["--deterministic", *options]
    try:
        with Console() as console:
            for name in ("one", "other"):
                arguments = [*common, "--run-folder", str(tmp_path / name)]
                assert train.main(*parse(arguments), console) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_weights(tmp_path / "one", tmp_path / "other")


def test_the_largest_batch_of_a_dry_run_fits() -> None:
    """The memory of steps with 64 and 32 images predicts that of 128 images within a tenth."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    network = model.BarlowTwins(model.build_backbone("resnet18"), "512-512", 0.0051).to(device)

    def step(batch_size: int) -> None:
        model.reset_peak_memory(device)
        network(*torch.randn(2, batch_size, 3, 96, 96, device=device)).loss.backward()

    step(64)
    peak = model.peak_memory(device)
    largest = model.largest_batch(device, 64, peak, lambda: step(32))
    available = 0.95 * torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    step(128)
    assert model.peak_memory(device) / 128 == pytest.approx(available / largest, rel=0.1)


def test_a_step_does_not_wait_for_the_gpu() -> None:
    """Between two lines of metrics the host only queues work, in LARS and in the guard as well."""
    device = torch.device("cuda")
    network = model.BarlowTwins(model.build_backbone("resnet18"), "512-512", 0.0051).to(device)
    optimizer = model.LARS(model.parameter_groups(network, 1e-6), lr=0.1)
    guard = model.StepSaver(network, lambda step: {}, None, 0)
    views = torch.randn(2, 8, 3, 64, 64, device=device)

    def step() -> None:
        optimizer.zero_grad()
        network(*views).loss.backward()
        with guard.update(lambda: optimizer.skipped):
            optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
