"""What a dry run reports."""

from __future__ import annotations

from experiment.dry_run import dry_run_table


def test_one_process_on_a_cpu() -> None:
    table = dry_run_table(
        peak_bytes=2_340_000_000,
        largest_batch=5000,
        seconds=5400,
        images=4000,
        devices="cpu, 8 cores",
        ranks=1,
    )
    assert table == {
        "peak memory": "2.3 GB",
        "largest batch": "all 4,000 images in one step would fit",
        "the whole run": "about 90 min on cpu, 8 cores, at the speed of the second step",
    }


def test_several_gpus() -> None:
    table = dry_run_table(
        peak_bytes=70_000_000_000,
        largest_batch=3000,
        seconds=36_000,
        images=1_281_167,
        devices="8 x NVIDIA H100",
        ranks=8,
    )
    assert table == {
        "peak memory": "70.0 GB on each rank",
        "largest batch": "about 3,000 images in one step would fit",
        "the whole run": "about 10.0 h, 80.0 GPU-hours on 8 x NVIDIA H100, "
        "at the speed of the second step",
    }
