"""What is watched while a run trains."""

from __future__ import annotations

SKIPPED_IN_A_ROW = (
    16  # steps that end a run: as often as float16's first scale can halve before it is 1
)


def diverged(step: int, loss: float, in_a_row: int) -> str:
    """Why a run ends that does not learn any more."""
    skipped = (
        f", the last of {in_a_row} steps in a row that were skipped, their gradients not being finite"
        * (in_a_row > 1)
    )
    return f"the loss is {loss} at step {step}{skipped}: try a lower --lr. checkpoint.pt is from before that"


def outlook(
    peak: int, largest: int, images: int, seconds: float, device: str, ranks: int
) -> dict[str, str]:
    """What a whole run will take. peak: bytes of each rank; largest: a batch of the `images`; seconds: of the run."""
    hours = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
    gpu_hours = "" if device.endswith("cores") else f", {ranks * seconds / 3600:,.1f} GPU-hours"
    fits = f"about {largest:,}" if largest < images else f"all {images:,}"
    return {
        "peak memory": f"{peak / 1e9:.1f} GB" + " on each rank" * (ranks > 1),
        "largest batch": f"{fits} images in one step would fit",
        "the whole run": f"about {hours}{gpu_hours} on {device}, as fast as the second step",
    }


def reading(values: dict[str, float]) -> str:
    """The numbers of a step in one line, for the progress bar."""
    if not values:
        return ""
    return (
        f"loss {values['loss']:.4g} (invariance {values['invariance']:.4g}, redundancy {values['redundancy']:.4g}), "
        f"diagonal {values['diagonal_mean']:.2f}, off-diagonal {values['off_diagonal_rms']:.3f}, "
        f"{values['images_per_s']:.0f} images/s, data wait {values['data_wait_fraction']:.0%}"
    )
