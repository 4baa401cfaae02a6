"""Numbers as the report of a run shows them."""

from __future__ import annotations


def format_number(value: float, unit: str = "") -> str:
    """A number with four digits; with the unit "%", a fraction as a percentage."""
    if unit == "%":
        return f"{100 * value:.3g} %"
    if abs(value) >= 1e5:
        return f"{value / 1000:,.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-")
