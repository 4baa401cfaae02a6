"""Charts: curves pass through their values, and long ones keep their extremes."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from experiment.charts import draw_chart, thin

VALUES = [3.0, 470.0, 20.0, None, 60.0, 150.0]
POINTS = [(100 * i, value) for i, value in enumerate(VALUES)]


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_a_curve_goes_through_its_values(log: bool) -> None:
    """Read off by the labels of the axes, as a person would."""
    figure = ElementTree.fromstring(draw_chart("Title", "", {"one": POINTS}, log=log))

    def fit_axis(axis: str, log: bool) -> np.ndarray:
        """The line from a number to its coordinate."""
        labels = [text for text in figure.iter("text") if text.get("class") == axis]
        numbers = [float((label.text or "").replace(",", "")) for label in labels]
        places = [float(label.get(axis) or "nan") for label in labels]
        assert len(labels) >= 3
        return np.polyfit(np.log(numbers) if log else numbers, places, 1)

    x_axis = fit_axis("x", log=False)
    y_axis = fit_axis("y", log=log)
    (path,) = (path.get("d") or "" for path in figure.iter("path"))
    drawn = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [pen for pen, _, _ in drawn] == ["M", "L", "L", "M", "L"]
    finite = [(step, value) for step, value in POINTS if value is not None]
    for (_, x, y), (step, value) in zip(drawn, finite, strict=True):
        height = math.log(value) if log else value
        assert float(x) == pytest.approx(np.polyval(x_axis, step), abs=0.2)
        assert float(y) == pytest.approx(np.polyval(y_axis, height), abs=0.2)


def test_the_values_at_a_step_can_be_read_in_words() -> None:
    figure = ElementTree.fromstring(draw_chart("Title", "", {"one": POINTS}))
    titles = [title.text for title in figure.iter("title")]
    assert titles[1] == "step 100, one 470"
    assert titles[3] == "step 300, one not finite"
    assert figure.findtext("output") == "step 500, one 150"


def test_a_chart_without_values_is_left_out() -> None:
    assert draw_chart("Title", "", {"one": [], "two": [(0, None)]}) == ""
    assert draw_chart("Title", "", {"one": [(0, 0.0), (1, -2.0)]}, log=True) == ""


def test_fractions_are_shown_as_percentages() -> None:
    html = draw_chart("Title", "", {"one": [(0, 0.25), (1, 0.5)]}, unit="%")
    assert "step 0, one 25 %" in html
    assert ">50 %</text>" in html


def test_a_long_curve_is_thinned_without_losing_its_extremes() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000)
    points: list[tuple[int, float | None]] = [(i, float(v)) for i, v in enumerate(values)]
    points[1234] = (1234, 99.0)
    points[9999] = (9999, None)
    kept = thin(points)
    assert len(kept) <= 500
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(1234, 99.0), (9999, None)} <= set(kept) <= set(points)
    assert thin(points[:100]) == points[:100]
