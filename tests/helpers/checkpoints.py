"""States of checkpoints, how tests compare them, and a full disk."""

from __future__ import annotations

import errno
from typing import Any, NoReturn

import torch

STATE: dict[str, Any] = {
    "step": 7,
    "settings": {"lr": 0.1, "blur_p": [1.0, 0.1], "width": None, "precision": "auto"},
    "model": {"weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor(3)},
    "optimizer": {"state": {0: {"mu": torch.tensor([1.5, -0.0, torch.inf], dtype=torch.float64)}}},
}


def state_at(step: int) -> dict[str, Any]:
    """The state after a step, which differs from the state after any other step."""
    return STATE | {"step": step, "model": {"weight": torch.arange(12.0) + step}}


def equal_to_the_bit(a: Any, b: Any) -> bool:
    """Whether nested dictionaries of tensors are the same bits, including the signs of zeros."""
    return bool(_to_bytes(a) == _to_bytes(b))


def raise_disk_full(*_: object) -> NoReturn:
    """Takes the place of a function that writes to the disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def _to_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _to_bytes(item) for key, item in value.items()}
    return value
