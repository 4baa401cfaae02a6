"""What a loader needs besides its store and its recipe, spelled once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoaderOptions:
    """How the samples of a store are decoded, ordered and batched.

    ValueError for values that no loader can have.
    """

    batch_size: int
    """Samples per step on each rank."""
    decoder: str = "auto"
    """auto (DALI on a GPU, else cpu), dali, cpu, or ffcv for a beton."""
    hw_decoder_load: float = 0.65
    """Fraction of the JPEGs that DALI gives to the GPU's JPEG engine, where there is one."""
    threads: int | None = None
    """Threads that decode; None: one per core that this process may use."""
    seed: int = 0
    """Decides the order of the samples and every distortion."""
    rank: int = 0
    """This process among `world_size` that train together."""
    world_size: int = 1
    shuffle: bool = True
    """True (training): each epoch is a permutation in batches of one size, and a bad sample is replaced.
    False (evaluation): samples come in the store's order, the last batch is short, a bad sample is left out."""
    shuffle_block: int | None = None
    """Samples in a block of the block-shuffled order (see `epoch_order`); None: a full shuffle."""
    device: torch.device | str = "cpu"
    """Where the views are made and returned."""
    dtype: torch.dtype = torch.float32
    """Data type of the views."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size is {self.batch_size}: it must be at least 1")
        if self.shuffle_block is not None and self.shuffle_block < 1:
            raise ValueError(
                f"blocks of {self.shuffle_block} samples cannot be shuffled: they must have at least 1"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def global_batch_size(self) -> int:
        """Samples per step on all ranks together."""
        return self.batch_size * self.world_size
