"""Weights in the layouts that other programs read."""

from __future__ import annotations

import io
from pathlib import Path

import safetensors.torch
import torch

from .backbone import Backbone
from .checkpoint import write_atomically


def export_backbone(backbone: Backbone, folder: Path) -> Path:
    """Write the backbone as `backbone.safetensors` (returned) and `backbone.pth`, a torchvision `state_dict`.

    Both have torchvision's names without `fc`, contiguous float tensors on the CPU.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    path = folder / "backbone.safetensors"
    write_atomically(path, safetensors.torch.save(weights))
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_atomically(folder / "backbone.pth", buffer.getbuffer())
    return path
