"""`LoaderOptions`: the settings of a `Loader`, apart from its store and its recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoaderOptions:
    """How a `Loader` orders, batches, decodes and returns the samples of a store.

    Args:
        batch_size: Samples per step on each rank.
        decoder: Name of the decoder: `dali`, `cpu`, or `ffcv` (only for a beton). Default: `auto`,
            which takes DALI on a GPU and `cpu` otherwise.
        hw_decoder_load: Fraction of the JPEGs that DALI gives to the GPU's hardware JPEG decoder,
            if the GPU has one.
        threads: Threads that decode. Default: one per CPU core that this process may use.
        seed: Seed of the order of the samples and of every distortion.
        rank: Rank of this process, in [0, `world_size`).
        world_size: Processes that train together, each on its own part of the global batch.
        shuffle: True for training: each epoch is a new permutation in batches of one size, and a
            bad sample is replaced by another one. False for evaluation: samples come in the
            store's order, the last batch may be short, and a bad sample is left out.
        shuffle_block: Samples per block of a block-wise shuffle (see `epoch_order`), for data on
            a hard disk or larger than the memory. Default: a full shuffle.
        device: Device on which the views are made and returned.
        dtype: Data type of the views.

    Raises:
        ValueError: If the batch size, the shuffle block or the rank is out of range.
    """

    batch_size: int
    decoder: str = "auto"
    hw_decoder_load: float = 0.65
    threads: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    shuffle_block: int | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size is {self.batch_size}: it must be at least 1")
        if self.shuffle_block is not None and self.shuffle_block < 1:
            raise ValueError(
                f"shuffle block is {self.shuffle_block} samples: it must be at least 1"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank}: with {self.world_size} processes it must be "
                f"between 0 and {self.world_size - 1}"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples per step on all ranks together."""
        return self.batch_size * self.world_size
