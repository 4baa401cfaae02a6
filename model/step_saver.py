"""Saving the last completed step of a training loop if the loop fails.

`StepSaver` also undoes what a skipped step has done to the running averages of batch norm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoints


class StepSaver:
    """Context manager around a training loop. It saves the last completed step if the loop fails.

    If an exception ends the loop, it saves `state(step)` and adds a note to the exception with the
    place to resume from. It ignores a FloatingPointError, because a run that has diverged would
    diverge again.

    Example::

        with StepSaver(network, state, checkpoints, first_step) as saver:
            for view_a, view_b in batches:
                optimizer.zero_grad()
                network(view_a, view_b).loss.backward()
                with saver.update(lambda: optimizer.skipped):
                    optimizer.step()

    Args:
        network: The network that is trained.
        state: Returns the checkpoint after a given number of steps, for `Checkpoints.save`.
        checkpoints: Where to save; None to save nothing.
        step: The number of steps completed before the loop.
        alone: Whether the device finishes its work without other ranks. If not, nothing is saved
            after a failure: work that is queued on a GPU may wait forever for a rank that is gone.

    Attributes:
        saved_at: Time of the last save, by `time.monotonic`.
        rescuing: Whether a failed loop is being saved; `state` may check its values then.
    """

    def __init__(
        self,
        network: nn.Module,
        state: Callable[[int], dict[str, Any]],
        checkpoints: Checkpoints | None,
        step: int,
        alone: bool = True,
    ) -> None:
        self._state = state
        self._checkpoints = checkpoints
        self._alone = alone
        self._completed_step = step
        self._saved_step = step
        self._is_updating = False
        self._averages = _BufferBackup(network)
        self.rescuing = False
        self.saved_at = time.monotonic()

    @contextmanager
    def update(self, skipped: Callable[[], Tensor]) -> Iterator[None]:
        """Context manager around the optimizer's step. It never waits for the device.

        Within it the weights belong to no step, so a failure there leaves nothing to save.

        Args:
            skipped: Called after the step. Returns a scalar on the network's device that is not 0
                if the optimizer left the weights unchanged. The running averages of batch norm,
                which the forward pass has updated, are then restored as well.
        """
        self._is_updating = True
        yield
        self._averages.update_or_restore(restore=skipped().bool())
        self._completed_step += 1
        self._is_updating = False

    def save(self, wait: bool = False, steps_back: int = 0) -> None:
        """Start saving the last completed step.

        Args:
            wait: Return only when the checkpoint is on the disk.
            steps_back: Save as this many steps earlier, because the steps since were skipped.

        Raises:
            OSError: Writing failed. Without `wait`, this is the error of the previous save.
        """
        if self._checkpoints is not None:
            self._checkpoints.save(self._state(self._completed_step - steps_back))
            if wait:
                self._checkpoints.wait()
        self._saved_step = self._completed_step
        self.saved_at = time.monotonic()

    def __enter__(self) -> StepSaver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._checkpoints is None or not isinstance(error, Exception):
            return
        if not isinstance(error, FloatingPointError):
            outcome = self._rescue(self._checkpoints)
            error.add_note(f"training stopped after step {self._completed_step:,}; {outcome}")

    def _rescue(self, checkpoints: Checkpoints) -> str:
        """Save the last completed step if possible. Returns the outcome, for a message."""
        self.rescuing = True
        obstacle = ""
        try:
            checkpoints.wait()  # checkpoints.step is the step on the disk only after that
            if self._completed_step > self._saved_step:
                self._save_after_failure()
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            obstacle = f"step {self._completed_step:,} could not be saved ({reason}); "

        if not checkpoints.step:
            return f"{obstacle}there is no checkpoint to resume from"
        return (
            f"{obstacle}the last checkpoint is step {checkpoints.step:,} in {checkpoints.path}: "
            "continue with --resume"
        )

    def _save_after_failure(self) -> None:
        if self._is_updating:
            raise RuntimeError("the next update had begun")
        if not self._alone:
            raise RuntimeError("its GPU may wait for a rank that is gone")
        self._averages.restore()  # the forward pass of the failed step may have updated them
        self.save(wait=True)


class _BufferBackup:
    """A copy of the buffers of a network, as of the last step that was not skipped.

    The buffers of each dtype are copied to one flat tensor, so that each operation on all of them
    is one kernel launch.
    """

    def __init__(self, network: nn.Module) -> None:
        # For each dtype: the buffers, their flat copy, and views of it in the buffers' shapes.
        self._groups: list[tuple[list[Tensor], Tensor, list[Tensor]]] = []
        for dtype in {buffer.dtype for buffer in network.buffers()}:
            buffers = [buffer for buffer in network.buffers() if buffer.dtype == dtype]
            backup = _flatten(buffers)
            parts = backup.split([buffer.numel() for buffer in buffers])
            views = [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)]
            self._groups.append((buffers, backup, views))

    def update_or_restore(self, restore: Tensor) -> None:
        """Restore the buffers if `restore` (bool, on the device) is true, else copy them."""
        for buffers, backup, views in self._groups:
            # torch.where selects, so NaN in the values that are not selected does no harm.
            torch.where(restore, backup, _flatten(buffers), out=backup)
            torch._foreach_copy_(buffers, views)

    def restore(self) -> None:
        """Set the buffers to the copy."""
        for buffers, _, views in self._groups:
            torch._foreach_copy_(buffers, views)


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
