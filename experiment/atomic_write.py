"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. A process that is killed leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, "utf-8", "backslashreplace")
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(values), indent=2, default=str) + "\n")


def finite(value: Any) -> Any:
    """The same value with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
