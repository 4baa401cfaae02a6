"""A picture of what the network sees: the first thing to look at when a run learns nothing."""

from __future__ import annotations

import torch
from PIL import Image

from .decoders.cpu import CpuDecoder
from .loader import Loader
from .options import LoaderOptions
from .order import epoch_order
from .recipe import Recipe, center_view
from .stores import Store, Subset

_CANDIDATES = 32  # images tried, since some may not decode
_LEAST_SIDE = 96  # pixels; smaller views are enlarged by a whole factor


def view_grid(store: Store, recipe: Recipe, seed: int = 0, images: int = 8) -> Image.Image | None:
    """A column for each of the first images of epoch 0 that decode: the image, undistorted, above its views.

    The distortions are drawn like those of training, for samples renumbered here. None where no image decodes.
    """
    pictured = Subset(store, epoch_order(len(store), seed, 0)[:_CANDIDATES])
    from torchvision.utils import (
        make_grid,  # seconds to import, and whoever converts needs no picture
    )

    rows = []
    for shown in (center_view(recipe.size), recipe):
        decoder = CpuDecoder(pictured, shown, threads=1)
        loader = Loader(
            pictured,
            shown,
            decoder,
            LoaderOptions(threads=1, batch_size=len(pictured), seed=seed, shuffle=False),
        )
        rows += [view[:images] for batch in loader.epoch(0) for view in batch.views]
    if not rows:
        return None
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    pixels = (torch.cat(rows) * std + mean).clamp_(0, 1).mul_(255).round_().byte()
    enlarge = -(-_LEAST_SIDE // recipe.size)
    pixels = pixels.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return Image.fromarray(
        make_grid(pixels, nrow=len(rows[0]), padding=4, pad_value=255).permute(1, 2, 0).numpy()
    )
