"""A picture of what the network sees: the first thing to look at if a run does not learn."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from .decoders.cpu import CpuDecoder
from .loader import Loader
from .options import LoaderOptions
from .order import epoch_order
from .recipe import Recipe, center_view
from .stores import Store, Subset

_CANDIDATES = 32  # images that are tried, because some may not decode
_MIN_SIDE = 96  # pixels; smaller views are enlarged by a whole factor


def view_grid(store: Store, recipe: Recipe, seed: int = 0, images: int = 8) -> Image.Image | None:
    """A grid with a column for each of several images: the undistorted image above its views.

    The images are the first ones of epoch 0 that decode. Their distortions are drawn as in
    training, but not the same, because the samples are renumbered. Returns None if no image
    decodes.
    """
    # Imported here because it takes seconds, and a conversion needs no picture.
    from torchvision.utils import make_grid

    candidates = Subset(store, epoch_order(len(store), seed, 0)[:_CANDIDATES])
    rows = []
    for row_recipe in (center_view(recipe.size), recipe):
        rows += [view[:images] for view in _all_views(candidates, row_recipe, seed)]
    if not rows:
        return None

    mean = torch.tensor(recipe.mean)[:, None, None]
    std = torch.tensor(recipe.std)[:, None, None]
    pixels = (torch.cat(rows) * std + mean).clamp_(0, 1).mul_(255).round_().byte()
    factor = -(-_MIN_SIDE // recipe.size)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(pixels, nrow=len(rows[0]), padding=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def _all_views(store: Store, recipe: Recipe, seed: int) -> list[Tensor]:
    """The views of all images that decode, each [n, 3, S, S]; an empty list if none does."""
    options = LoaderOptions(batch_size=len(store), threads=1, seed=seed, shuffle=False)
    loader = Loader(store, recipe, CpuDecoder(store, recipe, threads=1), options)
    return [view for batch in loader.epoch(0) for view in batch.views]
