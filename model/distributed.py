"""The processes that train one network together, as torchrun starts them: what they share, sum and agree on.

One process without torchrun is a world of one, for which everything here costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, rendezvous  # type: ignore[attr-defined]

T = TypeVar("T")

_PATIENCE = timedelta(
    minutes=30
)  # of a rank that waits for the others: the first one may index a large folder


class Distributed:
    """This process among those that torchrun has started; `rank`, `size`, and both among those on its machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank, self.size = (
            int(environment.get("RANK", 0)),
            int(environment.get("WORLD_SIZE", 1)),
        )
        self.local_rank = int(environment.get("LOCAL_RANK", 0))
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
        self.is_rank0 = self.rank == 0
        self._store: Store | None = None
        self._vote: tuple[dist.Work, Tensor] | None = None

    @contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Within the block the ranks can speak to each other: by NCCL between GPUs, and by gloo between CPUs.

        An error that ends the block is to end the process: the others are told by their broken connections, and fail
        with a ConnectionError, so that the reason is said once.
        """
        if self.size == 1:
            yield
            return
        self._store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        try:
            yield
        except Exception as error:
            if self._first_to_fail():
                raise
            broken = ConnectionError("another rank has failed, whose error says why")
            for note in getattr(error, "__notes__", ()):
                broken.add_note(note)
            raise broken from None
        self.leave()

    def leave(self) -> None:
        """The end of all that is done together; from here on, this process is a world of one."""
        if dist.is_initialized():
            if self._vote is not None:
                self._vote[0].wait()
            dist.destroy_process_group()

    def from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, where alone it is called; pickled for the others."""
        if self.size == 1:
            return make()
        box = [make() if self.is_rank0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def any_rank(self, mine: bool) -> bool:
        """Whether a rank said yes: the same answer on all of them, to be asked by all of them equally often.

        Among several it is about what they said one call earlier: the answer then travels while the step is computed.
        """
        if self.size == 1:
            return mine
        if self._vote is not None:
            work, votes = self._vote
            work.wait()
            self._vote = None
            if votes.item():
                return True
        votes = torch.tensor(int(mine))
        self._vote = dist.all_reduce(votes, async_op=True), votes  # on the CPU, by gloo
        return False

    def _first_to_fail(self) -> bool:
        """Whether no other rank has failed before. The ranks that fail next do so because this one has."""
        assert self._store is not None
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # whoever kept the store is gone
            return False


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """The sum, from which each rank goes on to compute its own part of the loss: gradients add up over ranks too."""
    return x if world_size() == 1 else _SumOverRanks.apply(x)


def all_reduce_identity_grad(x: Tensor) -> Tensor:
    """The sum, from which every rank computes the same, whole loss: its gradient is whole already."""
    return x if world_size() == 1 else _SumOfCopies.apply(x)


def all_gather(x: Tensor) -> Tensor:
    """[W, ...] of all ranks, from which each goes on to compute its own part of the loss."""
    return x[None] if world_size() == 1 else _Gather.apply(x)


def _summed(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _gathered(x: Tensor) -> Tensor:
    found = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(found, x.contiguous())
    return found.view(world_size(), *x.shape)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


class _SumOfCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)[dist.get_rank()]
