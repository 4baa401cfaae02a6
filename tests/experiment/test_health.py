"""Findings about the health of a run: healthy runs, and everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiment.health import Finding, assess_health
from experiment.run_record import read_run
from tests.helpers.run_records import ILLNESSES, healthy_line, unhealthy_lines, write_run


def findings_by_title(folder: Path, lines: list[dict[str, Any]]) -> dict[str, Finding]:
    findings = assess_health(read_run(write_run(folder, lines)))
    return {finding.title: finding for finding in findings}


def test_a_healthy_run_has_only_good_findings(tmp_path: Path) -> None:
    findings = findings_by_title(tmp_path, [healthy_line(step) for step in range(200)])
    assert {finding.severity for finding in findings.values()} == {"good"}
    assert "From 500 to 71.49 (-86%)" in findings["The loss has fallen"].text
    assert "goal 1" in findings["The views agree"].text
    assert (
        "0.12 is expected for independent dimensions in a batch of 64"
        in findings["The views agree"].text
    )
    assert findings.keys() >= {
        "The features differ between images",
        "kNN accuracy is rising",
        "Data loading keeps up",
    }


@pytest.mark.parametrize("name", ILLNESSES)
def test_an_unhealthy_run_has_a_finding_with_the_numbers_and_a_remedy(
    tmp_path: Path, name: str
) -> None:
    illness = ILLNESSES[name]
    findings = findings_by_title(tmp_path, unhealthy_lines(illness))
    assert findings[illness.title].severity == illness.severity
    assert illness.words in findings[illness.title].text
    problems = [f.title for f in findings.values() if f.severity in ("bad", "warn")]
    if illness.severity == "note":
        assert problems == []
    else:
        assert problems == [illness.title]
        assert next(iter(findings)) == illness.title, "the worst finding comes first"


def test_accuracy_that_falls_is_a_warning(tmp_path: Path) -> None:
    lines = [healthy_line(step) for step in range(200)]
    for line in lines:
        if "knn_top1" in line:
            line["knn_top1"] = 60 - line["knn_top1"]
    findings = findings_by_title(tmp_path, lines)
    assert findings["kNN accuracy is not rising"].severity == "warn"
    assert "first 40.2 %" in findings["kNN accuracy is not rising"].text


def test_trained_features_are_compared_with_the_baselines(tmp_path: Path) -> None:
    write_run(tmp_path, [healthy_line(step) for step in range(200)])

    def severities(trained: float) -> dict[str, str]:
        summary = {
            "knn_top1_trained": trained,
            "knn_top1_pixels": 22.0,
            "knn_top1_colour": None,
        }
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return {f.title: f.severity for f in assess_health(read_run(tmp_path))}

    assert severities(20.0)["The features do not beat the baselines"] == "warn"
    assert severities(30.0)["The features beat the baselines"] == "good"


def test_a_run_with_few_losses_is_not_judged(tmp_path: Path) -> None:
    findings = findings_by_title(tmp_path, [healthy_line(step) for step in range(4)])
    assert findings["Too early to judge"].severity == "note"
    assert "The loss has fallen" not in findings
