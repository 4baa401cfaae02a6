"""What a dry run reports: the memory and the time that the whole run will take."""

from __future__ import annotations


def dry_run_table(
    peak_bytes: int, largest_batch: int, seconds: float, images: int, devices: str, ranks: int
) -> dict[str, str]:
    """The rows of the table that `train.py --dry-run` prints.

    Args:
        peak_bytes: Peak memory of each rank.
        largest_batch: Images of a step that would fit, on all ranks together.
        seconds: Of the whole run.
        images: In the training set.
        devices: Their number and name.
        ranks: Number of ranks.
    """
    memory = f"{peak_bytes / 1e9:.1f} GB"
    if ranks > 1:
        memory += " on each rank"
    fits = f"about {largest_batch:,}" if largest_batch < images else f"all {images:,}"
    duration = f"{seconds / 60:.0f} min" if seconds <= 5400 else f"{seconds / 3600:.1f} h"
    if not devices.endswith("cores"):
        duration += f", {ranks * seconds / 3600:,.1f} GPU-hours"
    return {
        "peak memory": memory,
        "largest batch": f"{fits} images in one step would fit",
        "the whole run": f"about {duration} on {devices}, at the speed of the second step",
    }
