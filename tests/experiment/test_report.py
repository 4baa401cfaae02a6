"""The page about a run: what it holds, that it is right, and what it says of runs that are ill."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from experiment.health import read_run, verdict
from experiment.report import chart, thinned, write_report
from tests.helpers.images import picture
from tests.helpers.runs import TRAIN

CONFIG = {
    "preset": "demo",
    "images": 6400,
    "batch_size": 64,
    "epochs": 2,
    "lr": 0.2,
    "blur_p": [1.0, 0.1],
    "lambd": 0.005,
}
VOID = {"meta", "img", "br", "line", "link", "input", "hr"}


def line(step: int, steps: int = 200) -> dict[str, Any]:
    """What a run that is well writes at this step."""
    part = step / steps
    return {
        "step": step,
        "epoch": step / 100,
        "lr": 0.05 * min(1.0, 10 * part),
        "lr_biases": 0.001 * min(1.0, 10 * part),
        "loss": 500 * math.exp(-2 * part),
        "invariance": 400 * math.exp(-3 * part),
        "redundancy": 2000.0,
        "diagonal_mean": 0.9 * part,
        "off_diagonal_rms": 0.2,
        "feature_deviation": 0.5 + 0.4 * part,
        "effective_rank": 20 + 60 * part,
        "skipped": 0,
        "bad_images": 0,
        "images_per_s": 1000.0,
        "data_wait_fraction": 0.01,
    } | ({"knn_top1": 10 + 40 * part, "probe_top1": 12 + 50 * part} if step % 50 == 49 else {})


def write_run(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with everything in its folder."""
    run = write_run(tmp_path / "run", [line(step) for step in range(200)])
    (run / "environment.json").write_text(
        json.dumps({"started": "2030-01-01T00:00:00+00:00", "torch": "2.99"})
    )
    (run / "summary.json").write_text(
        json.dumps({"knn_top1_trained": 50.0, "knn_top1_untrained": 12.5})
    )
    picture(300, 120).save(run / "views.png")
    (run / "correlation").mkdir()
    for step in (0, 100):
        np.save(
            run / "correlation" / f"{step:08d}.npy", (np.eye(64) * step / 100).astype(np.float16)
        )
    return run


class Page(HTMLParser):
    """Reads a page, and minds that each tag is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.links: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_holds_everything_and_loads_nothing(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert page.text["h1"] == ["run"]
    assert page.text["h2"] == [
        "Healthy",
        "Curves",
        "Cross-correlation",
        "Views",
        "Configuration",
        "Environment",
    ]
    assert "finished" in page.text["b"]
    assert {"data", "optim"} <= set(page.text["caption"])
    assert {"blur_p", "1, 0.1", "torch", "2.99"} <= {*page.text["th"], *page.text["td"]}
    assert len(re.findall("<svg", page.html)) == 8
    assert len(page.links) == 3
    assert all(link.startswith("data:image") for link in page.links)
    assert "://" not in page.html
    assert "@import" not in page.html
    assert not re.search(r"url\(", page.html)
    assert not list(run.glob("*.tmp"))


def test_the_matrices_are_drawn_in_the_colours_of_the_scale(run: Path) -> None:
    matrix = np.zeros((64, 64), np.float16)
    matrix[3, 5], matrix[5, 3], matrix[7, 7] = 1, -1, 0.5
    np.save(run / "correlation" / "00000100.npy", matrix)
    page = Page(write_report(run))
    image = Image.open(io.BytesIO(base64.b64decode(page.links[1].partition(",")[2])))
    assert image.size == (64, 64)
    blue, red, half, nothing = (image.getpixel(at) for at in ((5, 3), (3, 5), (7, 7), (0, 0)))
    assert "#{:02x}{:02x}{:02x}".format(*blue[:3]) in page.html.partition("linear-gradient")[2][:99]
    assert "#{:02x}{:02x}{:02x}".format(*red[:3]) in page.html.partition("linear-gradient")[2][:99]
    assert (blue[3], red[3], half[3], nothing[3]) == (255, 255, 128, 0)


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_a_curve_goes_through_its_values(log: bool) -> None:
    """Placed by the labels of the axes, as a reader would."""
    values = [3.0, 470.0, 20.0, None, 60.0, 150.0]
    figure = ElementTree.fromstring(
        chart("T", "", {"one": [(100 * i, v) for i, v in enumerate(values)]}, log=log)
    )
    axes = {}
    for axis, at in (("x", "x"), ("y", "y")):
        labels = [t for t in figure.iter("text") if t.get("class") == axis]
        number = [float((t.text or "").replace(",", "")) for t in labels]
        place = [float(t.get(at) or "nan") for t in labels]
        axes[axis] = np.polyfit(np.log(number) if log and axis == "y" else number, place, 1)
        assert len(labels) >= 3
    (path,) = (path.get("d") or "" for path in figure.iter("path"))
    found = [
        (pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    ]
    assert [pen for pen, *_ in found] == ["M", "L", "L", "M", "L"]
    for (_, x, y), (i, value) in zip(
        found, ((i, v) for i, v in enumerate(values) if v is not None), strict=True
    ):
        assert x == pytest.approx(np.polyval(axes["x"], 100 * i), abs=0.2)
        assert y == pytest.approx(np.polyval(axes["y"], math.log(value) if log else value), abs=0.2)
    said = [title.text for title in figure.iter("title")]
    assert said[1] == "step 100, one 470"
    assert said[3] == "step 300, one not finite"
    assert figure.findtext("output") == "step 500, one 150"


def test_a_long_run_is_thinned_without_losing_its_extremes(run: Path) -> None:
    rng = np.random.default_rng(0)
    points: list[tuple[int, float | None]] = [
        (i, float(v)) for i, v in enumerate(rng.normal(size=20_000))
    ]
    points[1234], points[9999] = (1234, 99.0), (9999, None)
    kept = thinned(points)
    assert len(kept) <= 500
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(1234, 99.0), (9999, None)} <= set(kept) <= set(points)
    assert thinned(points[:100]) == points[:100]
    write_run(run, [line(step, 20_000) for step in range(20_000)])
    assert write_report(run).stat().st_size < 1 << 20


def findings(
    folder: Path, lines: list[dict[str, Any]], **config: Any
) -> dict[str, tuple[str, str]]:
    return {
        title: (tone, text)
        for tone, title, text in verdict(read_run(write_run(folder, lines, **config)))
    }


def test_a_healthy_run_is_said_to_be_well(tmp_path: Path) -> None:
    said = findings(tmp_path, [line(step) for step in range(200)])
    assert {tone for tone, _ in said.values()} == {"good"}
    assert "From 500 to 71.49 (-86%)" in said["The loss has fallen"][1]
    assert "goal 1" in said["The views agree"][1]
    assert "0.12 is chance in a batch of 64" in said["The views agree"][1]
    assert {"The features differ between images", "kNN accuracy rises", "Fed"} <= said.keys()


ILL = {
    "collapsed": (
        "bad",
        "Collapsed",
        "lower --lr",
        {"effective_rank": 1.01, "feature_deviation": 0.001},
    ),
    "poorer": ("warn", "The features get poorer", "collapse", {"effective_rank": 15.0}),
    "starved": (
        "warn",
        "Starved",
        "40.0% of the time is spent waiting for data. `python -m bench`",
        {"data_wait_fraction": 0.4},
    ),
    "rising": ("warn", "The loss rises", "after 112.7", {"loss": 300.0}),
    "not falling": ("warn", "The loss has not fallen", "From 500 to 510 (+2%)", {"loss": 510.0}),
    "diverged": ("bad", "Diverged", "since step 150", {"loss": None, "invariance": None}),
    "skipping": ("bad", "Steps were skipped", "90 of 200", {"skipped": 90}),
    "some skipped": ("note", "Steps were skipped", "1 of 200", {"skipped": 1}),
    "bad images": ("warn", "Images do not decode", "320 of 6,400", {"bad_images": 320}),
    "redundant": ("warn", "The dimensions repeat each other", "--lambd", {"off_diagonal_rms": 0.8}),
    "apart": ("warn", "The views do not agree yet", "milder", {"diagonal_mean": 0.1}),
    "warned": (
        "warn",
        "Warned 50 times, from step 150 to 199",
        "the disk is <slow>",
        {"warning": "the disk is <slow>"},
    ),
}


@pytest.mark.parametrize("illness", ILL)
def test_an_ill_run_is_told_what_it_has_and_what_helps(tmp_path: Path, illness: str) -> None:
    tone, title, words, symptoms = ILL[illness]
    said = findings(
        tmp_path, [line(step) | (symptoms if step >= 150 else {}) for step in range(200)]
    )
    assert said[title][0] == tone
    assert words in said[title][1]
    assert tone == "note" or next(iter(said.values()))[0] == tone  # the worst first
    assert [title for title, (tone, _) in said.items() if tone in ("bad", "warn")] in ([title], [])
    Page(write_report(tmp_path))


def test_what_was_learned_is_measured_against_plain_features(run: Path) -> None:
    summary = {"knn_top1_trained": 20.0, "knn_top1_pixels": 22.0, "knn_top1_colour": None}
    (run / "summary.json").write_text(json.dumps(summary))
    said = {title: tone for tone, title, _ in verdict(read_run(run))}
    assert said["It has learned nothing that plain features do not know"] == "warn"
    (run / "summary.json").write_text(json.dumps(summary | {"knn_top1_trained": 30.0}))
    assert "It has learned" in {title for _, title, _ in verdict(read_run(run))}


def test_the_state_of_a_run_is_named(run: Path) -> None:
    (run / "summary.json").unlink()
    write_run(run, [line(step) for step in range(50)])
    lock = run / ".lock"
    assert read_run(run).status() == (
        "stopped",
        "at step 50 of 200; --resume goes on from its last checkpoint",
    )
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        slow = [line(step) | {"images_per_s": 1.0} for step in range(50)]
        assert read_run(write_run(run, slow)).status() == (
            "running",
            "at step 50 of 200, 2 h 40 min left",
        )
    assert read_run(run).status()[0] == "stopped"
    (run / "preempted").touch()
    assert read_run(run).status()[0] == "preempted"
    assert "--resume" in Page(write_report(run)).html


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path) -> None:
    assert Page(write_report(write_run(tmp_path, []))).text["h2"][0] == "Nothing to say yet"
    (tmp_path / "config.json").unlink()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.')
    (tmp_path / "views.png").write_bytes(b"")
    (tmp_path / "correlation").mkdir()
    (tmp_path / "correlation" / "00000000.npy").write_bytes(b"\x93NUMPY")
    page = Page(write_report(tmp_path))
    assert page.text["b"].count("Too early to judge.") == 1
    assert page.text["section"].count("Nothing yet.") == 4


def test_a_torn_or_foreign_line_costs_no_other(run: Path) -> None:
    whole = Page(write_report(run)).html
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n"step"\n{"loss": 3}\n{"step": 200, "warning": "torn at a }')
    torn = Page(write_report(run)).html
    assert re.sub("ConversionProgress .*? UTC", "", torn) == re.sub(
        "ConversionProgress .*? UTC", "", whole
    )


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    hostile = '</table><script>alert("1")</script>&amp;'
    lines = [line(step) | {"warning": hostile} for step in range(20)]
    run = write_run(tmp_path / "<b>&", lines, preset=hostile, **{hostile: [hostile]})
    page = Page(write_report(run))
    assert page.text["h1"] == ["<b>&"]
    assert page.text["td"].count(hostile) == 2
    assert page.text["th"].count(hostile) == 1
    assert "alert" not in "".join(page.text["script"])


def test_one_door(run: Path, tmp_path: Path) -> None:
    def door(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "runlog", *map(str, arguments)]
        return subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)

    result = door(run)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{run}/report.html\n", "")
    result = door(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path} is no folder of a run")
    assert result.stderr.count("\n") == 1
