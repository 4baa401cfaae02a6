"""The choice of precision and compilation on a CPU."""

from __future__ import annotations

import pytest
import torch

from model import choose_compilation, choose_precision

CPU = torch.device("cpu")


def test_a_cpu_trains_in_float32_and_uncompiled_by_default() -> None:
    assert choose_precision("auto", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_compilation("auto", CPU) == (None, "not compiled")


def test_a_machine_without_a_compiler_trains_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_compile(function: object) -> object:
        raise RuntimeError("no C compiler\nin 40 lines")

    monkeypatch.setattr(torch, "compile", failing_compile)
    mode, phrase = choose_compilation("default", CPU)
    assert mode is None
    assert "no C compiler" in phrase
    assert "\n" not in phrase
