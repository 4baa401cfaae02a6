"""Types and checks of options that several commands share."""

from __future__ import annotations

from typing import Literal

DecoderName = Literal["auto", "dali", "cpu", "torchvision", "ffcv"]
"""`torchvision` is the name that `cpu` had, kept as an alias."""
