"""What a training loop keeps of its last completed step, so that neither a fault nor a skipped step takes it away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoints


class StepGuard:
    """The last completed step of a training loop, which a fault in the next one does not take away.

    Around the loop, it has that step, `state(step)`, saved when an exception ends it, and notes on the exception where
    to go on from. (Not on a FloatingPointError: what has diverged would again.) `checkpoints` None: never.
    Not `alone` neither: among several GPUs, what the device has queued may wait for ever for one that is gone.
    """

    def __init__(
        self,
        network: nn.Module,
        state: Callable[[int], dict[str, Any]],
        checkpoints: Checkpoints | None,
        step: int,
        alone: bool = True,
    ) -> None:
        self._state, self._checkpoints, self._done, self._saved, self._whole = (
            state,
            checkpoints,
            step,
            step,
            True,
        )
        self._alone, self.rescuing = alone, False
        self.saved_at = time.monotonic()
        # Batch norm's averages, which the forward pass changes, as of the last step that was not skipped: by type, all
        # in one tensor, so that each thing done to them is one operation. (buffers, their copy, its parts as they are)
        self._averages: list[tuple[list[Tensor], Tensor, list[Tensor]]] = []
        for dtype in {b.dtype for b in network.buffers()}:
            buffers = [b for b in network.buffers() if b.dtype == dtype]
            kept = _flat(buffers)
            parts = zip(kept.split([b.numel() for b in buffers]), buffers, strict=True)
            self._averages.append((buffers, kept, [part.view(b.shape) for part, b in parts]))

    @contextmanager
    def update(self, skipped: Callable[[], Tensor]) -> Iterator[None]:
        """Around the optimizer's step: in there the weights belong to no step, and a fault leaves nothing to save.

        `skipped` is asked afterwards: 0-d, on the network's device, not 0 where the optimizer has left the weights as
        they were. The averages are then set back as well. Waits for no device.
        """
        self._whole = False
        yield
        verdict = skipped().bool()
        for buffers, kept, parts in self._averages:
            torch.where(
                verdict, kept, _flat(buffers), out=kept
            )  # selects: a NaN in the other is no matter
            torch._foreach_copy_(buffers, parts)
        self._done, self._whole = self._done + 1, True

    def save(self, wait: bool = False, steps_back: int = 0) -> None:
        """Begin to save the last step; `wait` until it is on the disk. OSError: of the save before, unless waiting.

        steps_back: so many steps were skipped since the one that is saved.
        """
        if self._checkpoints is not None:
            self._checkpoints.save(self._state(self._done - steps_back))
            if wait:
                self._checkpoints.wait()
        self._saved, self.saved_at = self._done, time.monotonic()

    def __enter__(self) -> StepGuard:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if (
            isinstance(error, Exception)
            and not isinstance(error, FloatingPointError)
            and self._checkpoints is not None
        ):
            error.add_note(f"it ended after step {self._done:,}{self._rescue(self._checkpoints)}")

    def _rescue(self, checkpoints: Checkpoints) -> str:
        lost = "" if self._whole else ", in the middle of the next update"
        self.rescuing = True
        try:
            checkpoints.wait()  # only then is it known which step is on the disk
            if self._whole and self._done > self._saved:
                if not self._alone:
                    raise RuntimeError("its GPU may wait for a rank that is gone")
                for buffers, _, parts in self._averages:
                    torch._foreach_copy_(buffers, parts)
                self.save(wait=True)
        except Exception as reason:
            lost = f", which cannot be saved ({(str(reason) or repr(reason)).splitlines()[0]})"
        if not checkpoints.step:
            return f"{lost}: nothing is saved to go on from"
        which = f"{lost}: step {checkpoints.step:,}" if lost else ", which"
        return f"{which} is saved in {checkpoints.path}: --resume goes on from there"


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
