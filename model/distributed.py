"""Training on several ranks: the processes that torchrun starts, and the collectives they use.

A process that was started without torchrun is the only rank. Everything here then costs nothing.
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

# How long a rank waits for the others: rank 0 may have to index a large folder meanwhile.
_TIMEOUT = timedelta(minutes=30)


class Distributed:
    """This process as one of the ranks that torchrun has started.

    Args:
        environment: The environment variables, which torchrun sets (`os.environ`).

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        local_rank: The number of this process among those on its machine.
        local_size: The number of processes on its machine.
        is_rank0: Whether this is the process that logs and saves.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank = int(environment.get("RANK", 0))
        self.size = int(environment.get("WORLD_SIZE", 1))
        self.local_rank = int(environment.get("LOCAL_RANK", 0))
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
        self.is_rank0 = self.rank == 0
        self._store: Store | None = None
        self._pending_vote: tuple[dist.Work, Tensor] | None = None

    @contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Connect the ranks within the block, with NCCL for GPUs and with gloo for CPUs.

        An exception that ends the block should end the process. The other ranks then fail because
        their connections break. They raise a ConnectionError instead of that secondary exception,
        so that only one rank reports the reason.
        """
        if self.size == 1:
            yield
            return

        self._store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=device if on_gpu else None,
        )
        try:
            yield
        except Exception as error:
            if self._is_first_to_fail():
                raise
            secondary = ConnectionError("another rank has failed; its error message has the reason")
            for note in getattr(error, "__notes__", ()):
                secondary.add_note(note)
            raise secondary from None
        self.leave()

    def leave(self) -> None:
        """Disconnect from the other ranks. This process is the only rank from now on."""
        if not dist.is_initialized():
            return
        if self._pending_vote is not None:
            work, _ = self._pending_vote
            work.wait()
        dist.destroy_process_group()

    def from_rank0(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only, and return its (pickled) result on all ranks."""
        if self.size == 1:
            return make()
        box = [make() if self.is_rank0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def any_rank(self, value: bool) -> bool:
        """Whether `value` is true on any rank. All ranks get the same answer.

        All ranks must call this equally often. On several ranks, the answer is about the values of
        the *previous* call, so that no rank waits: the values travel while the step is computed.
        """
        if self.size == 1:
            return value

        if self._pending_vote is not None:
            work, votes = self._pending_vote
            work.wait()
            self._pending_vote = None
            if votes.item():
                return True

        votes = torch.tensor(int(value))  # on the CPU, so that gloo sends it
        work = dist.all_reduce(votes, async_op=True)
        self._pending_vote = work, votes
        return False

    def all_ranks(self, value: bool) -> bool:
        """Whether `value` is true on all ranks. Each rank waits for the others."""
        if self.size == 1:
            return value
        votes = torch.tensor(int(value))  # on the CPU, so that gloo sends it
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes.item())

    def _is_first_to_fail(self) -> bool:
        """Whether no other rank has failed before. Later failures follow from the first one."""
        assert self._store is not None
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # the process that kept the store is gone
            return False


def world_size() -> int:
    """The number of connected ranks; 1 outside of `Distributed.process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: Tensor) -> Tensor:
    """Sum x over the ranks; the gradient is summed over the ranks too.

    For a sum from which each rank goes on to compute its own part of the loss.
    """
    return x if world_size() == 1 else _AllReduce.apply(x)


def all_reduce_identity_grad(x: Tensor) -> Tensor:
    """Sum x over the ranks; the gradient is passed through unchanged.

    For a sum from which every rank computes the same, whole loss: the gradient on each rank is
    complete already.
    """
    return x if world_size() == 1 else _AllReduceIdentityGrad.apply(x)


def all_gather(x: Tensor) -> Tensor:
    """Stack x of all ranks to [W, ...]; each rank gets the summed gradient of its own part.

    For values from which each rank goes on to compute its own part of the loss.
    """
    return x[None] if world_size() == 1 else _AllGather.apply(x)


def _sum_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum_over_ranks(grad)


class _AllReduceIdentityGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous())
        return rows.view(world_size(), *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum_over_ranks(grad)[dist.get_rank()]
