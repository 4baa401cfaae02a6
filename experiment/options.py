"""Types and checks of options that several commands share."""

from __future__ import annotations

from typing import Literal

import tyro

DecoderName = Literal["auto", "dali", "cpu", "torchvision", "ffcv"]
"""`torchvision` is the name that `cpu` had, kept as an alias."""

DEFAULT_IN_HELP = tyro.conf.arg(help_behavior_hint="")
"""Annotation of an option whose help text says what happens if it is not given.

tyro would add "(default: None)" to that text.
"""


def check_option(option: str, value: object, valid: bool, requirement: str) -> None:
    """ValueError that names the option, its value and what it must be, unless `valid`."""
    if not valid:
        raise ValueError(f"{option} is {value}: it must be {requirement}")
