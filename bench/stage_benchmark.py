"""Measures every stage in order, each beside its roofline.

The work of the stages is in `stages.py`, the clock in `timing.py`, the rooflines in `rooflines.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from experiment import ProgressBar

from . import rooflines
from .record import StageResult
from .resource_bounds import StageRates, lowest_bound, without_step
from .stage_names import (
    COLD,
    COPY,
    DECODE,
    DESCRIPTIONS,
    DISTORT,
    E2E,
    FEED,
    ONE_CORE,
    PLAN,
    STEP,
    TWO_CROPS,
    WARM,
)
from .stages import Stages
from .timing import Action, Clock, RankGroup, Repeats, Workload, do_nothing

QUICK = Repeats(seconds=0.4, count=3)
FULL = Repeats(seconds=2.0, count=5)

_MANY_READERS = 32  # threads: more than a disk needs to be kept busy
_SUM_OF_PARTS = "its parts in sequence"
_LIBJPEG = "bare libjpeg-turbo"


class Roofline(NamedTuple):
    """An upper bound of a stage; `images_per_s` is None if it could not be measured."""

    images_per_s: float | None
    name: str


_NONE = Roofline(None, "")


class StageBenchmark:
    """One run over all stages.

    Args:
        stages: The work.
        conditions: The resources and the data, without any rates yet.
        jpegs: A sample of the encoded images, for the rooflines of reading and decoding.
        ranks: The processes that measure together.
        repeats: How often and how long each stage is measured.
        bar: Shows the progress.
    """

    def __init__(
        self,
        stages: Stages,
        conditions: StageRates,
        jpegs: Sequence[bytes],
        ranks: RankGroup,
        repeats: Repeats,
        bar: ProgressBar,
    ) -> None:
        self.results: list[StageResult] = []
        self._stages = stages
        self._conditions = conditions
        self._jpegs = jpegs
        self._ranks = ranks
        self._bar = bar
        self._clock = Clock(stages.device, ranks, repeats)
        self._threads = stages.settings.threads
        self._chip = "GPU" if conditions.on_gpu else "cores"
        self._decoder = "GPU" if conditions.decodes_on_gpu else "cores"
        # Both views of an image as they leave the decoder. Finished views take 4 times as much.
        self._crop_bytes = 2 * 3 * stages.settings.size**2

    @property
    def measured(self) -> StageRates:
        """The conditions with the rates that have been measured so far."""
        rates = {result.name: result.rates.median for result in self.results}
        return replace(self._conditions, rates=rates)

    def run(self) -> list[StageResult]:
        """Measure all stages."""
        self._measure_reading()
        libjpeg = self._measure_decoding()
        self._measure_distorting()
        self._measure_feed(libjpeg)
        self._measure_training()
        return self.results

    def _measure_reading(self) -> None:
        stages = self._stages
        self._measure(PLAN, stages.plan, "one core", _NONE)

        many = self._clock.measure_together(
            stages.cold_read(_MANY_READERS), before=stages.forget_files
        )
        disk = Roofline(max(many[0].images_per_s), f"{_MANY_READERS} readers")
        cold_read = stages.cold_read(self._threads)
        self._measure(COLD, cold_read, "disk", disk, before=stages.forget_files)

        mean_bytes = sum(len(data) for data in self._jpegs) / len(self._jpegs)
        memory = Roofline(rooflines.read_rate(mean_bytes, self._threads), "copying in memory")
        self._measure(WARM, stages.warm_read, "cores", memory)

    def _measure_decoding(self) -> Roofline:
        """Return the roofline of decoding on the cores."""
        libjpeg = _NONE
        if not self._conditions.decodes_on_gpu:
            libjpeg = Roofline(rooflines.decode_rate(self._jpegs, self._threads), _LIBJPEG)
        self._measure(DECODE, self._stages.decode, self._decoder, libjpeg)

        decoded = Roofline(self.measured.rates[DECODE], "decode")
        self._measure(TWO_CROPS, self._stages.decode_and_crop, self._decoder, decoded)
        return libjpeg

    def _measure_distorting(self) -> None:
        device = self._stages.device
        write_rate = rooflines.write_rate(4 * self._crop_bytes, device, self._threads)
        written = Roofline(write_rate, "writing the views")
        self._measure(DISTORT, self._stages.distort, self._chip, written)
        if self._conditions.on_gpu:
            transfer_rate = rooflines.transfer_rate(self._crop_bytes, device)
            self._measure(COPY, self._stages.copy, "bus", Roofline(transfer_rate, "one large copy"))

    def _measure_feed(self, libjpeg: Roofline) -> None:
        scales_from_one_core = (
            self._threads > 1 and not self._conditions.on_gpu and self._ranks.world_size == 1
        )
        if scales_from_one_core:
            one_core = _NONE
            if libjpeg.images_per_s is not None:
                one_core = Roofline(libjpeg.images_per_s / self._threads, _LIBJPEG)
            self._measure(ONE_CORE, self._stages.feed_on_one_core, "one core", one_core)
            perfect_scaling = self._threads * self.measured.rates[ONE_CORE]
            roofline = Roofline(perfect_scaling, f"{self._threads} x one core")
        else:
            # The step has not been measured yet, and is not part of the feed.
            roofline = Roofline(self._bound_of_parts(without_step(self.measured)), _SUM_OF_PARTS)
        self._measure(FEED, self._stages.feed, self._chip, roofline)

    def _measure_training(self) -> None:
        settings = self._stages.settings
        multiply_rate = rooflines.multiply_rate(settings.network, settings.size, settings.device)
        multiplied = Roofline(multiply_rate, "multiplying alone")
        self._measure(STEP, self._stages.step, self._chip, multiplied)

        parts = Roofline(self._bound_of_parts(self.measured), _SUM_OF_PARTS)
        self._measure(E2E, self._stages.end_to_end, self._chip, parts)

    def _bound_of_parts(self, measured: StageRates) -> float:
        """Images/s if each resource did its stages one after another, with cached files."""
        return lowest_bound(replace(measured, exceeds_memory=False))

    def _measure(
        self,
        name: str,
        work: Workload,
        resource: str,
        roofline: Roofline,
        before: Action = do_nothing,
    ) -> None:
        several = self._ranks.world_size > 1
        self._clock.after_each = self._progress_of(name)
        alone = self._clock.measure_alone(work, before)
        together = self._clock.measure_together(work, before)
        self._clock.after_each = do_nothing
        result = StageResult(
            name=name,
            description=DESCRIPTIONS[name],
            rates=together[0],
            resource=resource,
            roofline=roofline.images_per_s,
            roofline_name="" if roofline.images_per_s is None else roofline.name,
            ranks=together if several else [],
            alone=alone,
        )
        self.results.append(result)

    def _progress_of(self, name: str) -> Action:
        """Show a stage on the progress bar; the result is to be called after each repeat."""
        repeats = self._clock.repeats.count
        if self._ranks.world_size > 1:
            repeats *= 2  # alone, and together
        total = len(DESCRIPTIONS) * repeats
        first = list(DESCRIPTIONS).index(name) * repeats
        done = count(first + 1)
        self._bar(first, total, name)

        def after_each() -> None:
            self._bar(next(done), total, name)

        return after_each
