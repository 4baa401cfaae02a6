"""The peers of the benchmark do the same work as twinfeed, and the drawn photos cost what photographs do."""

from __future__ import annotations

import io
import os
import random
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.peers import Peer, missing, peers
from bench.photos import draw_photos, photo
from pipeline import LoaderOptions, barlow_twins, open_loader, open_store
from pipeline.recipe import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.images import encoded

NAMES = [
    "authors' transform (Pillow)",
    "lightly's BYOL transform",
    "torchvision v2 on tensors",
    "DALI's own operators",
    "kornia",
]
SIZE = 64
DRAWS = 12  # of 32 pictures each
CROPS = {
    "lightly's BYOL transform": 0.25,
    "kornia": 0.4,
}  # bilinear: 17% softer; not antialiased: 31% sharper

MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=NAMES)
def peer(request: pytest.FixtureRequest) -> Peer:
    if reason := missing().get(request.param):
        if os.environ.get("TWINFEED_CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (found,) = [peer for peer in peers(SIZE) if peer.name == request.param]
    return found


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Of all but DALI, which seeds itself: the bounds are four deviations wide."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (lightly draws from it)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def orange() -> list[bytes]:
    """Thirty-two drawn photos in an orange light, so that no two channels have the same mean."""
    light = np.array([1.1, 0.8, 0.4])
    pictures = (
        np.asarray(Image.open(io.BytesIO(photo(3, i, 160, 120)))) * light for i in range(32)
    )
    return [
        encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality=92)
        for pixels in pictures
    ]


def flat(colour: tuple[int, int, int], count: int = 32) -> list[bytes]:
    return [encoded(Image.new("RGB", (80, 60), colour), quality=95, subsampling=0)] * count


def drawn(peer: Peer, pictures: list[bytes]) -> Pair:
    a, b = zip(*(peer.views(pictures) for _ in range(DRAWS)), strict=True)
    return torch.cat(a), torch.cat(b)


def levels(views: Tensor) -> Tensor:
    """The middle pixel of normalised views, [n, 3] in levels of 255."""
    middle = views[:, :, SIZE // 2, SIZE // 2]
    return 255 * (middle * STD + MEAN)


def share(which: Tensor) -> float:
    return float(which.float().mean())


class Looks(NamedTuple):
    mean: Tensor  # [view, channel]
    std: Tensor  # [view]
    sharpness: Tensor  # [view]


def looks(views: Pair) -> Looks:
    std = torch.stack([view.std() for view in views])
    steps = torch.stack([view.diff(dim=3).abs().mean() for view in views])
    return Looks(torch.stack([view.mean((0, 2, 3)) for view in views]), std, steps / std)


@pytest.fixture(scope="module")
def ours(orange: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Looks:
    folder = tmp_path_factory.mktemp("orange")
    for i, data in enumerate(orange):
        (folder / f"{i}.jpg").write_bytes(data)
    loader = open_loader(
        open_store(folder),
        barlow_twins(SIZE),
        LoaderOptions(batch_size=32, device="cpu", seed=0, threads=1),
    )
    a, b = zip(*(batch.views for batch in loader.steps(0, 2 * DRAWS)), strict=True)
    return looks((torch.cat(a), torch.cat(b)))


def test_two_views_of_each_picture_drawn_anew_by_each_call(peer: Peer, orange: list[bytes]) -> None:
    for count in (1, 5, 32):
        views = [*peer.views(orange[:count]), *peer.views(orange[:count])]
        for view in views:
            assert view.shape == (count, 3, SIZE, SIZE)
            assert view.dtype == torch.float32
            assert view.isfinite().all()
            assert (
                view.min() > -2.4
            )  # black, normalised, is -2.12 at the least, white 2.64 at the most;
            assert view.max() < 3.0  # kornia's bicubic crops overshoot a little
        assert not any(
            torch.equal(one[i], other[i])
            for one, other in combinations(views, 2)
            for i in range(count)
        )


def test_the_views_look_like_ours(peer: Peer, orange: list[bytes], ours: Looks) -> None:
    """Colours, contrast and sharpness of view a and of view b: another implementation, other random numbers."""
    found = looks(drawn(peer, orange))
    torch.testing.assert_close(found.mean, ours.mean, rtol=0, atol=0.2)
    torch.testing.assert_close(found.std, ours.std, rtol=0.1, atol=0)
    torch.testing.assert_close(
        found.sharpness, ours.sharpness, rtol=CROPS.get(peer.name, 0.15), atol=0
    )


def test_colours_are_jittered_and_greyed_as_often_and_as_far_as_in_the_paper(peer: Peer) -> None:
    found = levels(drawn(peer, flat((200, 140, 80)))[0])
    gray = found.amax(1) - found.amin(1) < 4
    untouched = (found - torch.tensor([200, 140, 80])).abs().amax(1) < 4
    assert share(gray) == pytest.approx(0.2, abs=0.08)
    assert share(untouched) == pytest.approx(0.2 * 0.8, abs=0.08)

    red, green, blue = found[~gray].unbind(1)
    hue = torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))
    low, high = hue.quantile(torch.tensor([0.1, 0.9]))
    assert float(low) == pytest.approx(
        30 - 27, abs=15
    )  # of five views four are shifted, by up to 36 degrees
    assert float(high) == pytest.approx(30 + 27, abs=15)

    brightness = (
        levels(drawn(peer, flat((128, 128, 128)))[0]).mean(1) / 128
    )  # nothing else changes this grey
    assert float(brightness.min()) == pytest.approx(0.6, abs=0.04)
    assert float(brightness.max()) == pytest.approx(1.4, abs=0.04)


def test_view_b_alone_is_solarised(peer: Peer) -> None:
    """No jitter takes this grey below 128, save DALI's now and then; its negative stays there."""
    a, b = (share(levels(views).mean(1) < 127.5) for views in drawn(peer, flat((235, 235, 235))))
    assert a == pytest.approx(0, abs=0.03)
    assert b == pytest.approx(0.2, abs=0.08)


def test_half_of_the_views_are_flipped(peer: Peer) -> None:
    ramp = np.tile(np.linspace(20, 220, 80), (60, 1)).astype(np.uint8)
    for view in drawn(peer, [encoded(Image.fromarray(ramp).convert("RGB"), quality=95)] * 32):
        rising = view[:, :, :, SIZE // 2 :].mean((1, 2, 3)) > view[:, :, :, : SIZE // 2].mean(
            (1, 2, 3)
        )
        assert share(rising) == pytest.approx(0.5, abs=0.1)


def test_the_crops_of_the_two_views_are_drawn_apart(peer: Peer) -> None:
    """From red on the left to blue on the right, the balance of the two tells where a crop lies."""
    ramp = np.tile(np.linspace((220, 60, 40), (40, 60, 220), 80), (60, 1, 1)).astype(np.uint8)
    a, b = (
        255 * (view.mean((2, 3)) * STD + MEAN)
        for view in drawn(peer, [encoded(Image.fromarray(ramp))] * 32)
    )
    place_a, place_b = ((mean[:, 0] - mean[:, 2]) / mean.sum(1) for mean in (a, b))
    assert float(place_a.std()) > 0.1
    assert abs(float(torch.corrcoef(torch.stack((place_a, place_b)))[0, 1])) < 0.25


def test_views_come_in_the_order_of_the_pictures(peer: Peer) -> None:
    """Forty of them, which is more than DALI's batch."""
    red, blue = flat((220, 60, 40), 5), flat((40, 60, 220), 35)
    found = levels(peer.views([*red, *blue])[0])
    assert found.shape == (40, 3)
    towards_red = found[:, 0] - found[:, 2]  # 0 if grey
    assert (towards_red[:5] > -4).all()
    assert (towards_red[5:] < 4).all()


def test_photos_have_the_size_of_imagenets_and_are_drawn_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = draw_photos(
        tmp_path / "photos", 32, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(i + 1, 32) for i in range(32)]
    files = sorted(folder.glob("*.jpg"))
    assert {Image.open(io.BytesIO(path.read_bytes())).size for path in files} == {(500, 375)}
    assert np.mean([path.stat().st_size for path in files]) == pytest.approx(97_000, abs=5_000)
    assert len({path.read_bytes() for path in files}) == 32

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (
        draw_photos(
            tmp_path / "photos", 32, progress=lambda done, total: calls.append((done, total))
        )
        == folder
    )
    assert len(calls) == 32
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_photo_depends_on_its_seed_alone_and_other_settings_replace_it(tmp_path: Path) -> None:
    def contents(count: int, **settings: int) -> list[bytes]:
        folder = draw_photos(tmp_path / "photos", count, width=90, height=60, **settings)
        return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    first = contents(4)
    assert contents(3, seed=1) != first
    assert len(contents(2)) == 2 + 1
    assert contents(4) == first
    assert first[-1] == b"mine"

    (tmp_path / "photos" / "drawn.json").unlink()  # as after an interruption
    (tmp_path / "photos" / "drawn-00001.jpg").write_bytes(b"half")
    assert contents(4) == first
