"""Rooflines scale with what they are the rooflines of, and costs are counted as by hand."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from PIL import Image

from bench import rooflines, step
from bench.step_cost import TrafficCounter, step_flop, step_traffic
from experiment import PRESETS, ModelConfig
from tests.helpers.images import encoded, picture


@pytest.fixture
def jpegs() -> list[bytes]:
    return [encoded(picture(200, 150, seed=i)) for i in range(4)]


def test_images_of_half_the_size_are_copied_twice_as_fast() -> None:
    assert rooflines.read_rate(1000, 1) == pytest.approx(2 * rooflines.read_rate(2000, 1), rel=0.6)


def test_only_sound_jpegs_have_a_decode_rate(jpegs: list[bytes]) -> None:
    assert (rooflines.decode_rate(jpegs, 1) or 0) > 0
    png = encoded(picture(60, 50), "PNG")
    assert rooflines.decode_rate([*jpegs, png], 1) is None
    truncated = jpegs[0][:-300]
    assert rooflines.decode_rate([*jpegs, truncated], 1) is None
    assert rooflines.decode_rate([], 1) is None


def test_smaller_jpegs_decode_faster(jpegs: list[bytes]) -> None:
    assert (rooflines.small_decode_speedup(jpegs, 20) or 0) > 1
    assert rooflines.small_decode_speedup([encoded(picture(60, 50), "PNG")], 20) is None


def test_reduced_images_keep_their_proportions(jpegs: list[bytes]) -> None:
    images = [Image.open(io.BytesIO(data)) for data in rooflines.reduced(jpegs, 100)]
    assert {image.size for image in images} == {(100, 75)}


def test_multiplications_of_a_linear_layer_by_hand() -> None:
    """2 flop for each weight and view: in forward, for gradients of inputs and of weights."""
    network = PRESETS["demo"]().model
    narrow = step_flop(dataclasses.replace(network, projector="512-512"), 32)
    wide = step_flop(dataclasses.replace(network, projector="512-512-512"), 32)
    assert wide - narrow == 6 * 512 * 512 * 2


def test_traffic_agrees_with_the_known_rates_of_an_h200() -> None:
    """Its memory copies at 4.3 TB/s. See `step.KNOWN`."""
    network = ModelConfig()
    unfused, fused, _ = step.KNOWN["H200"]
    traffic = step_traffic(network, 224, torch.bfloat16)
    assert 4.3e12 / traffic == pytest.approx(unfused, rel=0.12)
    fused_traffic = step_traffic(network, 224, torch.bfloat16, fused=True)
    assert 4.3e12 / fused_traffic == pytest.approx(fused, rel=0.12)


@pytest.mark.parametrize("fused", [False, True])
def test_traffic_of_batch_norm_with_relu_by_hand(fused: bool) -> None:
    x = torch.zeros(64, 8, 16, 16, requires_grad=True)
    gradient = torch.ones(64, 8, 16, 16)
    with TrafficCounter(fused) as counter:
        y = torch.relu_(torch.nn.functional.batch_norm(x, None, None, training=True))
        torch.autograd.grad(y, x, gradient)
    # In units of x. Forward: read for the moments, then read and written. Backward: input and
    # gradient are both read for the sums, then both read and one written.
    norm = (1 + 2) + (2 + 3)
    # Forward: read and written. Backward: output and gradient read, one written.
    relu = 2 + 3
    expected = norm if fused else norm + relu
    assert counter.elements / x.numel() == pytest.approx(expected, rel=1e-3)


def test_rates_are_known_for_the_papers_network_only() -> None:
    paper = PRESETS["imagenet-1000e"]().model
    known = step.known_rooflines(paper, 224, "NVIDIA H200")
    assert list(known.values()) == [4050, 4950, 8600]
    assert not step.known_rooflines(paper, 224, "NVIDIA H100 80GB HBM3")
    assert not step.known_rooflines(paper, 224, None)
    assert not step.known_rooflines(paper, 96, "NVIDIA H200")
    other = PRESETS["imagenet-100e"]().model
    assert not step.known_rooflines(other, 224, "NVIDIA H200")
