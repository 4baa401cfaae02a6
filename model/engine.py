"""How the network is run on a device: its precision, and whether it is compiled."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for autocast. `auto`: bfloat16 on a GPU that has it, else float16 there; float32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def compile_network(network: AnyModule, when: str, device: torch.device) -> tuple[AnyModule, str]:
    """`network` compiled (it shares its parameters), or as it is; and in words what was done and why.

    when: "on", "off" or "auto" (on a GPU). A machine without a compiler goes on without: torch.compile finds that out
    only when it first runs, so a small function is tried here.
    """
    if when == "off" or (when == "auto" and device.type != "cuda"):
        return network, "not compiled"
    try:
        torch.compile(torch.square)(torch.ones(8, device=device))
    except Exception as error:
        return network, f"not compiled, since torch.compile fails here: {str(error).strip().splitlines()[0]}"
    network = torch.compile(network)  # type: ignore[assignment]  # an OptimizedModule, which behaves like it
    return network, "compiled at the first step"
