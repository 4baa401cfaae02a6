"""The same two views as others make them: what twinfeed's speed is compared with.

Each is written as its library's documentation has its users write it for speed (uint8 crops, batches and conditional
operations where there are any), on one core, with the paper's probabilities and ranges wherever the library can
express them; `differs` says where it cannot. All draw their own random numbers, so no two calls give the same views.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipeline.recipe import IMAGENET_MEAN, IMAGENET_STD, View, barlow_twins

Views = Callable[[Sequence[bytes]], tuple[Tensor, Tensor]]

_SOLARIZE_FROM = 128
_BLUR_WINDOW = 13  # pixels: 3 sigma of the widest blur to each side. SimCLR's 23 would double torchvision's time.
_DALI_BATCH = 32
_KORNIA_BATCH = 8  # its float images of more than that leave the cache: 50 images/s became 63


class Peer(NamedTuple):
    """A pipeline to compare with."""

    name: str
    packages: tuple[str, ...]  # the distributions whose versions belong to a record of its speed
    differs: str  # what it does otherwise than the paper; "" for the authors' own
    views: Views  # encoded JPEGs -> views a and b, each float32 [n, 3, size, size], normalised


def peers(size: int) -> list[Peer]:
    """Those that are installed, for views of `size` pixels. Torch's number of threads is left to the caller."""
    absent = missing()
    return [
        Peer(name, packages, differs, make(size))
        for name, _, packages, differs, make in _PEERS
        if name not in absent
    ]


def missing() -> dict[str, str]:
    """Why each of the others is not there, and what to do about it."""
    found = {}
    for name, module, packages, _, _ in _PEERS:
        try:
            import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            found[name] = f"{packages[0]} cannot be imported ({error}); try `uv sync --group bench`"
    return found


def _pillow(size: int) -> Views:
    """The authors': one Pillow decode an image, torchvision's first transforms."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))

    def solarize(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, _SOLARIZE_FROM)

    def transform(view: View) -> transforms.Compose:
        jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(view.flip_p),
                transforms.RandomApply([jitter], view.jitter_p),
                transforms.RandomGrayscale(view.gray_p),
                transforms.RandomApply([blur], view.blur_p),
                transforms.RandomApply([solarize], view.solarize_p),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    recipe = barlow_twins(size)
    sigma = recipe.views[0].blur_sigma
    return _image_by_image(_opened, *map(transform, recipe.views))


def _torchvision(size: int) -> Views:
    """torchvision's second transforms on tensors: uint8 up to the crop, as documented; float is faster from there."""

    def transform(view: View) -> v2.Compose:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(view.flip_p),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomApply([jitter], view.jitter_p),
                v2.RandomGrayscale(view.gray_p),
                v2.RandomApply([v2.GaussianBlur(_BLUR_WINDOW, view.blur_sigma)], view.blur_p),
                v2.RandomSolarize(_SOLARIZE_FROM / 255, view.solarize_p),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return _image_by_image(_decoded, *map(transform, barlow_twins(size).views))


def _lightly(size: int) -> Views:
    """Its BYOL transform has the paper's two views, and its Barlow Twins example uses it."""
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    return _image_by_image(
        _opened, BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    )


def _kornia(size: int) -> Views:
    """Crops image by image, since sizes differ; from there on batches, with parameters drawn for each sample."""
    from kornia import augmentation as K

    def distortions(view: View) -> nn.Sequential:
        steps: list[nn.Module] = [
            K.RandomHorizontalFlip(view.flip_p),
            K.ColorJitter(
                view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter_p
            ),
            K.RandomGrayscale(p=view.gray_p),
            K.RandomGaussianBlur(
                _BLUR_WINDOW, view.blur_sigma, border_type="replicate", p=view.blur_p
            ),
        ]
        if view.solarize_p:  # it costs time even where it is never applied
            threshold = _SOLARIZE_FROM / 255
            steps.append(K.RandomSolarize((threshold, threshold), (0.0, 0.0), p=view.solarize_p))
        return nn.Sequential(*steps, K.Normalize(IMAGENET_MEAN, IMAGENET_STD))

    crop = K.RandomResizedCrop((size, size), resample="bicubic")
    distort_a, distort_b = map(distortions, barlow_twins(size).views)

    @torch.inference_mode()
    def batch(encoded: Sequence[bytes]) -> tuple[Tensor, ...]:
        crops = [
            (crop(image), crop(image))
            for image in (_decoded(data)[None].float() / 255 for data in encoded)
        ]
        a, b = map(torch.cat, zip(*crops, strict=True))
        return distort_a(a), distort_b(b)

    return _in_batches(_KORNIA_BATCH, batch)


def _dali(size: int) -> Views:
    """One pipeline with one thread, in which `if` means: for those samples for which it is drawn."""
    from nvidia.dali import fn, pipeline_def, types

    def drawn(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def around(middle: float, strength: float) -> Any:
        return fn.random.uniform(range=(middle - strength, middle + strength))

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=_DALI_BATCH,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def two_views() -> tuple[Any, ...]:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        decoded = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        views = []
        for view in recipe.views:
            image = fn.random_resized_crop(decoded, size=size, interp_type=types.INTERP_CUBIC)
            if drawn(view.jitter_p):
                image = fn.color_twist(
                    image,
                    brightness=around(1, view.brightness),
                    contrast=around(1, view.contrast),
                    saturation=around(1, view.saturation),
                    hue=around(0, 360 * view.hue),  # degrees
                )
            if drawn(view.gray_p):
                gray = fn.color_space_conversion(
                    image, image_type=types.RGB, output_type=types.GRAY
                )
                image = fn.cat(gray, gray, gray, axis=2)
            if drawn(view.blur_p):
                image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=view.blur_sigma))
            if drawn(view.solarize_p):
                image = fn.lookup_table(image, keys=levels, values=solarized, dtype=types.UINT8)
            views.append(
                fn.crop_mirror_normalize(
                    image,
                    mirror=fn.random.coin_flip(probability=view.flip_p),
                    mean=[255 * mean for mean in IMAGENET_MEAN],
                    std=[255 * std for std in IMAGENET_STD],
                    output_layout="CHW",
                )
            )
        return tuple(views)

    recipe = barlow_twins(size)
    levels = list(range(256))
    solarized = [level if level < _SOLARIZE_FROM else 255 - level for level in levels]
    pipeline = two_views()
    pipeline.build()

    def batch(encoded: Sequence[bytes]) -> tuple[Tensor, ...]:
        pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        return tuple(from_dlpack(view.as_tensor()) for view in pipeline.run())

    return _in_batches(_DALI_BATCH, batch)


def _image_by_image(
    decode: Callable[[bytes], Any], view_a: Callable[[Any], Tensor], view_b: Callable[[Any], Tensor]
) -> Views:
    """As a data set and its loader do it: decode once, transform twice, collate."""

    def views(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        a, b = zip(*((view_a(image), view_b(image)) for image in map(decode, encoded)), strict=True)
        return torch.stack(a), torch.stack(b)

    return views


def _in_batches(size: int, batch: Callable[[Sequence[bytes]], tuple[Tensor, ...]]) -> Views:
    def views(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        a, b = zip(
            *(batch(encoded[i : i + size]) for i in range(0, len(encoded), size)), strict=True
        )
        return (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b))

    return views


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _decoded(data: bytes) -> Tensor:
    """uint8 [3, H, W]."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


# Name, module that has to import, distributions, what differs, and how it is made for views of a size.
_PEERS: tuple[tuple[str, str, tuple[str, ...], str, Callable[[int], Views]], ...] = (
    ("authors' transform (Pillow)", "torchvision", ("torchvision", "pillow"), "", _pillow),
    (
        "lightly's BYOL transform",
        "lightly.transforms",
        ("lightly", "torchvision", "pillow"),
        "bilinear crops",
        _lightly,
    ),
    (
        "torchvision v2 on tensors",
        "torchvision",
        ("torchvision", "torch"),
        "blur within 6 pixels, its borders reflected",
        _torchvision,
    ),
    (
        "DALI's own operators",
        "nvidia.dali",
        ("nvidia-dali-cuda130",),
        "jitter in a fixed order, contrast about mid-grey, hue by a linear rotation, blur borders reflected",
        _dali,
    ),
    (
        "kornia",
        "kornia.augmentation",
        ("kornia", "torchvision", "torch"),
        "crops without antialiasing, one order of the jitter a batch, blur within 6 pixels",
        _kornia,
    ),
)
