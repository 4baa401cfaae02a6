"""The page about a run: it is complete, loads nothing else, and shows any folder of a run."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiment.report import write_report
from tests.helpers.images import picture
from tests.helpers.run_records import ILLNESSES, healthy_line, unhealthy_lines, write_run
from tests.helpers.runs import TRAIN

VOID_TAGS = {"meta", "img", "br", "line", "link", "input", "hr"}
LINK_ATTRIBUTES = {"src", "href", "srcset", "xlink:href"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, with everything in it."""
    run = write_run(tmp_path / "run", [healthy_line(step) for step in range(200)])
    environment = {"started": "2030-01-01T00:00:00+00:00", "torch": "2.99"}
    (run / "environment.json").write_text(json.dumps(environment))
    summary = {"knn_top1_trained": 50.0, "knn_top1_untrained": 12.5}
    (run / "summary.json").write_text(json.dumps(summary))
    picture(300, 120).save(run / "views.png")
    (run / "correlation").mkdir()
    for step in (0, 100):
        matrix = (np.eye(64) * step / 100).astype(np.float16)
        np.save(run / "correlation" / f"{step:08d}.npy", matrix)
    return run


class Page(HTMLParser):
    """Reads a page, and checks that each tag is closed where it should be."""

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
        self._add_links(attributes)
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._add_links(attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def _add_links(self, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in LINK_ATTRIBUTES]


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


def test_matrices_have_the_colours_of_the_scale(run: Path) -> None:
    matrix = np.zeros((64, 64), np.float16)
    matrix[3, 5] = 1
    matrix[5, 3] = -1
    matrix[7, 7] = 0.5
    np.save(run / "correlation" / "00000100.npy", matrix)
    page = Page(write_report(run))
    image = Image.open(io.BytesIO(base64.b64decode(page.links[1].partition(",")[2])))
    assert image.size == (64, 64)
    blue, red, half, zero = (image.getpixel(at) for at in ((5, 3), (3, 5), (7, 7), (0, 0)))
    scale = page.html.partition("linear-gradient")[2][:99]
    assert "#{:02x}{:02x}{:02x}".format(*blue[:3]) in scale
    assert "#{:02x}{:02x}{:02x}".format(*red[:3]) in scale
    assert (blue[3], red[3], half[3], zero[3]) == (255, 255, 128, 0)


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    run = write_run(tmp_path, [healthy_line(step, 20_000) for step in range(20_000)])
    assert write_report(run).stat().st_size < 1 << 20


@pytest.mark.parametrize("name", ILLNESSES)
def test_the_page_of_an_unhealthy_run_names_the_problem(tmp_path: Path, name: str) -> None:
    illness = ILLNESSES[name]
    page = Page(write_report(write_run(tmp_path, unhealthy_lines(illness))))
    assert f"{illness.title}." in page.text["b"]
    assert illness.words in " ".join(page.text["p"])


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, [])))
    assert page.text["h2"][0] == "Nothing to report yet"


def test_files_that_are_incomplete_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(healthy_line(0)) + "\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.')
    (tmp_path / "views.png").write_bytes(b"")
    (tmp_path / "correlation").mkdir()
    (tmp_path / "correlation" / "00000000.npy").write_bytes(b"\x93NUMPY")
    page = Page(write_report(tmp_path))
    assert page.text["b"].count("Too early to judge.") == 1
    assert page.text["section"].count("Nothing yet.") == 4


def test_damaged_lines_of_metrics_do_not_change_the_page(run: Path) -> None:
    def page_without_time() -> str:
        return re.sub("Written .*? UTC", "", Page(write_report(run)).html)

    intact = page_without_time()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n"step"\n{"loss": 3}\n{"step": 200, "warning": "torn at a }')
    assert page_without_time() == intact


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    hostile = '</table><script>alert("1")</script>&amp;'
    lines = [healthy_line(step) | {"warning": hostile} for step in range(20)]
    run = write_run(tmp_path / "<b>&", lines, preset=hostile, **{hostile: [hostile]})
    page = Page(write_report(run))
    assert page.text["h1"] == ["<b>&"]
    assert page.text["td"].count(hostile) == 2
    assert page.text["th"].count(hostile) == 1
    assert "alert" not in "".join(page.text["script"])


def test_the_command_prints_the_path_of_the_page(run: Path, tmp_path: Path) -> None:
    def report(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "experiment.report", str(folder)]
        return subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)

    done = report(run)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}/report.html\n", "")

    refused = report(tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"error: {tmp_path} is not the folder of a run")
    assert refused.stderr.count("\n") == 1
