"""The comparison with peers: who takes part, on which images, and how ratios are taken."""

from __future__ import annotations

import statistics
from importlib import metadata

import pytest

import pipeline
from bench import peer_comparison
from bench.peers import installed_peers
from bench.record import PeerResult
from experiment import Console
from tests.helpers.images import encoded, picture


def compare(images: list[bytes]) -> list[PeerResult]:
    with Console() as console, console.progress_bar("peers") as bar:
        return peer_comparison.compare(images, 24, True, bar)


def is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def test_all_take_part_and_are_compared_with_the_authors_round_by_round() -> None:
    png = encoded(picture(9, 9), "PNG")
    results = compare([png, *(encoded(picture(90, 70, seed=i)) for i in range(4))])
    decoders = list(pipeline.FOR_ANY_STORE)
    if not is_installed("nvidia-dali-cuda130"):
        decoders.remove("dali")
    ours = [f"twinfeed, {decoder}{px}" for decoder in decoders for px in ("", ", 400 px")]
    theirs = [peer.name for peer in installed_peers(24)]
    assert [result.name for result in results] == theirs + ours

    authors = results[0]
    assert authors.name.startswith("authors'")
    assert authors.ratio == 1
    for result in results:
        assert len(result.rates.images_per_s) == 3
        rounds = zip(result.rates.images_per_s, authors.rates.images_per_s, strict=True)
        assert result.ratio == pytest.approx(statistics.median(a / b for a, b in rounds))
        assert result.versions["python"]


def test_nothing_is_compared_without_jpegs() -> None:
    assert compare([encoded(picture(9, 9), "PNG")]) == []


def test_our_loaders_decode_every_image_although_the_last_batch_is_not_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = [encoded(picture(50, 40, seed=i)) for i in range(41)]
    samples: list[list[int]] = []
    epoch = pipeline.Loader.epoch

    def watched(loader: pipeline.Loader, number: int) -> object:
        seen: list[int] = []
        samples.append(seen)
        for batch in epoch(loader, number):
            seen.extend(int(sample) for sample in batch.samples)
            yield batch

    monkeypatch.setattr(pipeline.Loader, "epoch", watched)
    for candidate in peer_comparison.own_candidates(images, 24):
        candidate.run()
    assert len(samples) >= 2
    assert all(sorted(seen) == list(range(41)) for seen in samples)
