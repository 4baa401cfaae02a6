"""What a run observes about itself while it trains: throughput, readings, collapse, divergence and
bad images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .console import Console
from .metrics import Metrics
from .throughput import ThroughputMeter

if TYPE_CHECKING:
    from torch import Tensor

    from model import CollapseMonitor
    from pipeline import Loader

_MOST_SKIPPED_IN_A_ROW = 16  # as often as float16's first loss scale can halve before it is 1


@dataclass
class Progress:
    """How far a run is, and what it has observed: the part of a checkpoint that is not weights or
    settings.
    """

    step: int = 0
    """Completed steps."""
    first_loss: float = math.nan
    readings: dict[str, float] = field(default_factory=dict)
    """Of the last logged step."""
    throughput: dict[str, float] | None = None
    """`ThroughputMeter.state`."""
    highest_readings: dict[str, float] | None = None
    """`CollapseMonitor.highest`."""

    def to_checkpoint(self) -> dict[str, Any]:
        """The entries of a checkpoint."""
        return {
            "step": self.step,
            "loss_first": self.first_loss,
            "values": self.readings,
            "fed": self.throughput,
            "highest": self.highest_readings,
        }

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any] | None) -> Progress:
        """The progress that a checkpoint holds; of a run that starts from nothing if `saved` is
        None.
        """
        if saved is None:
            return cls()
        return cls(
            step=saved["step"],
            first_loss=saved.get("loss_first", math.nan),
            readings=saved.get("values", {}),
            throughput=saved.get("fed"),
            highest_readings=saved.get("highest"),
        )


class TrainingMonitor:
    """Follows a run, logs its numbers, and warns in plain words.

    Args:
        console: Where warnings and bad images are printed.
        metrics: Where the numbers are written.
        loader: The loader of the training images; `loader.bad` has the images that cannot be
            decoded.
        meter: The throughput so far.
        collapse: Detects features that collapse.
        progress: What the run had observed before it was resumed.
    """

    def __init__(
        self,
        console: Console,
        metrics: Metrics,
        loader: Loader,
        meter: ThroughputMeter,
        collapse: CollapseMonitor,
        progress: Progress,
    ) -> None:
        self.meter = meter
        self.first_loss = progress.first_loss
        self.readings = progress.readings
        self.skipped_in_a_row = 0
        self._console = console
        self._metrics = metrics
        self._loader = loader
        self._collapse = collapse
        self._bad_images_printed = 0

    def log(
        self,
        step: int,
        readings: dict[str, float],
        learning_rates: dict[str, float],
        skipped_steps: Tensor,
        scores: dict[str, float],
    ) -> None:
        """Write a line of metrics, and print a warning if the features collapse.

        Args:
            step: The step, counted from 0.
            readings: `model.readings` of the step.
            learning_rates: By parameter group.
            skipped_steps: `LARS.skipped_steps`: skipped in all, and in a row.
            scores: Accuracies on held-out images, if they were tested after this step.
        """
        self.readings = readings | self.meter.read()
        if math.isnan(self.first_loss):
            self.first_loss = readings["loss"]
        skipped, self.skipped_in_a_row = (int(count) for count in skipped_steps)
        warning = self._collapse.warning(readings)
        if warning:
            self._console.print(f"step {step:,}: {warning}")
        self._metrics.write(
            step,
            {
                "epoch": (step + 1) / len(self._loader),
                **learning_rates,
                **self.readings,
                "skipped": skipped,
                "bad_images": len(self._loader.bad),
                "warning": warning,
                **scores,
            },
        )

    def has_diverged(self) -> bool:
        """Whether so many steps in a row were skipped that the run will not recover."""
        return self.skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW

    def divergence(self, step: int) -> str:
        """Why a run that has diverged ends, and what helps."""
        return (
            f"the loss is {self.readings['loss']} at step {step}, the last of "
            f"{self.skipped_in_a_row} steps in a row that were skipped because their gradients "
            "were not finite: try a lower --lr. checkpoint.pt holds the state before these "
            "steps"
        )

    def print_bad_images(self) -> None:
        """Name the images that were found to be bad since the last call."""
        if len(self._loader.bad) == self._bad_images_printed:
            return
        bad = {
            self._loader.store.name(sample): reason
            for sample, reason in list(self._loader.bad.items())  # the loader's thread adds to it
        }
        self._bad_images_printed = self._console.print_rejects(
            "replaced", bad, self._bad_images_printed
        )

    def status(self) -> str:
        """The readings of the last logged step in one line, for the progress bar."""
        values = self.readings
        if not values:
            return ""
        return (
            f"loss {values['loss']:.4g} (invariance {values['invariance']:.4g}, "
            f"redundancy {values['redundancy']:.4g}), diagonal {values['diagonal_mean']:.2f}, "
            f"off-diagonal {values['off_diagonal_rms']:.3f}, "
            f"{values['images_per_s']:.0f} images/s, "
            f"waiting for data {values['data_wait_fraction']:.0%}"
        )

    def progress(self, step: int) -> Progress:
        """For a checkpoint after `step` completed steps."""
        return Progress(
            step, self.first_loss, self.readings, self.meter.state(), self._collapse.highest
        )
