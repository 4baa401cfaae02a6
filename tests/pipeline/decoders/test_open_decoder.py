"""Which decoder `open_decoder` chooses, and what it refuses."""

from __future__ import annotations

import re
import sys

import pytest

from pipeline import DECODERS, barlow_twins
from tests.helpers.libraries import import_or_skip
from tests.helpers.stores import FixedSizeStore, decoder_of

RECIPE = barlow_twins(24)
EMPTY = FixedSizeStore([])


@pytest.mark.parametrize(
    ("requested", "device", "dali_installed", "name", "reason"),
    [
        ("auto", "cpu", True, "cpu", "no GPU"),
        ("auto", "cuda", True, "dali", "on a GPU"),
        ("auto", "cuda", False, "cpu", "DALI cannot be imported: .*dali.*"),
        ("dali", "cpu", True, "dali", "as requested"),
        ("cpu", "cuda", True, "cpu", "as requested"),
    ],
)
def test_auto_takes_dali_on_a_gpu_if_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    requested: str,
    device: str,
    dali_installed: bool,
    name: str,
    reason: str,
) -> None:
    if dali_installed:
        import_or_skip("pipeline.decoders.dali")
    else:
        monkeypatch.setitem(sys.modules, "pipeline.decoders.dali", None)
    decoder = decoder_of(requested, EMPTY, RECIPE, device=device)
    assert decoder.name == name
    assert re.fullmatch(reason, decoder.reason)


def test_torchvision_is_an_alias_of_cpu() -> None:
    decoder = decoder_of("torchvision", EMPTY, RECIPE)
    assert type(decoder) is type(decoder_of("cpu", EMPTY, RECIPE))
    assert decoder.name == "cpu"
    assert decoder.reason == "as requested"


def test_unknown_decoder_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown decoder 'jpeg9000': choose auto or") as error:
        decoder_of("jpeg9000", EMPTY, RECIPE)
    assert all(name in str(error.value) for name in DECODERS)


@pytest.mark.parametrize(
    ("decoder", "remedy"),
    [
        ("dali", r"DALI cannot be imported.*uv sync"),
        ("ffcv", r"FFCV cannot be imported.*apt-get install lib.*uv sync --extra ffcv"),
    ],
)
def test_missing_library_is_refused_with_the_remedy(
    decoder: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"pipeline.decoders.{decoder}", None)
    with pytest.raises(ValueError, match=remedy) as error:
        decoder_of(decoder, EMPTY, RECIPE)
    assert "\n" not in str(error.value)
