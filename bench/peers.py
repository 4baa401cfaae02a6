"""The same two views as made by other projects: the peers that twinfeed's speed is compared with.

Each peer is written the way its library's documentation recommends for speed (uint8 crops, batches
and conditional operations if it has them), for one core, with the paper's probabilities and ranges.
`differs` names what the library cannot express. All peers draw their own random numbers, so no two
calls return the same views. bench/NOTES.md has the measurements behind the choices.
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
"""Encoded JPEGs -> views a and b, each float32 [n, 3, size, size], normalised."""

_SOLARIZE_FROM = 128
# Pixels: 3 sigma of the widest blur to each side. SimCLR's 23 would double torchvision's time.
_BLUR_WINDOW = 13
_DALI_BATCH = 32
# More of kornia's float images do not fit into the cache: batches of 32 make 50 images/s, of 8 63.
_KORNIA_BATCH = 8


class Peer(NamedTuple):
    """A pipeline to compare with."""

    name: str
    packages: tuple[str, ...]  # distributions that determine its speed
    differs: str  # how it differs from the paper, "" for the authors' own
    views: Views


class PeerSpec(NamedTuple):
    """How a peer is made if its library is installed."""

    name: str
    module: str  # that has to be importable
    packages: tuple[str, ...]
    differs: str
    make: Callable[[int], Views]  # for views of a size


def installed_peers(size: int) -> list[Peer]:
    """The peers with an installed library, for views of `size` pixels.

    torch's number of threads is left to the caller.
    """
    missing = missing_peers()
    return [
        Peer(spec.name, spec.packages, spec.differs, spec.make(size))
        for spec in _SPECS
        if spec.name not in missing
    ]


def missing_peers() -> dict[str, str]:
    """The reason and the remedy for each peer that cannot be imported."""
    reasons = {}
    for spec in _SPECS:
        try:
            import_module(spec.module)
        except (ImportError, OSError) as error:  # OSError: a shared library does not load
            reasons[spec.name] = (
                f"{spec.packages[0]} cannot be imported ({error}); try `uv sync --group bench`"
            )
    return reasons


def _pillow(size: int) -> Views:
    """The authors' transform: each image decoded once by Pillow, torchvision's v1 transforms."""

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
    view_a, view_b = (transform(view) for view in recipe.views)
    return _image_by_image(_decode_with_pillow, view_a, view_b)


def _torchvision(size: int) -> Views:
    """torchvision's v2 transforms on tensors.

    uint8 up to the crop, as its documentation recommends. From there float is faster.
    """

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

    view_a, view_b = (transform(view) for view in barlow_twins(size).views)
    return _image_by_image(_decode_with_torchvision, view_a, view_b)


def _lightly(size: int) -> Views:
    """lightly's BYOL transform, with the paper's two views; its Barlow Twins example uses it."""
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    view_a = BYOLView1Transform(input_size=size)
    view_b = BYOLView2Transform(input_size=size)
    return _image_by_image(_decode_with_pillow, view_a, view_b)


def _kornia(size: int) -> Views:
    """Crops one image at a time, since sizes differ; distorts batches, each sample by itself."""
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
        if view.solarize_p:  # it costs time even with a probability of 0
            threshold = _SOLARIZE_FROM / 255
            steps.append(K.RandomSolarize((threshold, threshold), (0.0, 0.0), p=view.solarize_p))
        return nn.Sequential(*steps, K.Normalize(IMAGENET_MEAN, IMAGENET_STD))

    crop = K.RandomResizedCrop((size, size), resample="bicubic")
    distort_a, distort_b = (distortions(view) for view in barlow_twins(size).views)

    @torch.inference_mode()
    def make_batch(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        crops_a, crops_b = [], []
        for data in encoded:
            image = _decode_with_torchvision(data)[None].float() / 255  # [1, 3, H, W]
            crops_a.append(crop(image))
            crops_b.append(crop(image))
        return distort_a(torch.cat(crops_a)), distort_b(torch.cat(crops_b))

    return _in_batches(_KORNIA_BATCH, make_batch)


def _dali(size: int) -> Views:
    """One DALI pipeline with one thread, on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    recipe = barlow_twins(size)

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
            views.append(_dali_distortions(image, view))
        return tuple(views)

    pipeline = two_views()
    pipeline.build()

    def make_batch(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8) for data in encoded])
        view_a, view_b = pipeline.run()
        return from_dlpack(view_a.as_tensor()), from_dlpack(view_b.as_tensor())

    return _in_batches(_DALI_BATCH, make_batch)


def _dali_distortions(image: Any, view: View) -> Any:
    """Crops to finished views.

    DALI compiles the conditions: an operation applies to the samples with a true `_dali_coin`.
    """
    from nvidia.dali import fn, types

    if _dali_coin(view.jitter_p):
        image = fn.color_twist(
            image,
            brightness=_dali_uniform(1, view.brightness),
            contrast=_dali_uniform(1, view.contrast),
            saturation=_dali_uniform(1, view.saturation),
            hue=_dali_uniform(0, 360 * view.hue),  # degrees
        )
    if _dali_coin(view.gray_p):
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        image = fn.cat(gray, gray, gray, axis=2)
    if _dali_coin(view.blur_p):
        image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=view.blur_sigma))
    if _dali_coin(view.solarize_p):
        levels = list(range(256))
        solarized = [level if level < _SOLARIZE_FROM else 255 - level for level in levels]
        image = fn.lookup_table(image, keys=levels, values=solarized, dtype=types.UINT8)
    return fn.crop_mirror_normalize(
        image,
        mirror=fn.random.coin_flip(probability=view.flip_p),
        mean=[255 * mean for mean in IMAGENET_MEAN],
        std=[255 * std for std in IMAGENET_STD],
        output_layout="CHW",
    )


def _dali_coin(p: float) -> Any:
    """True with probability `p`, for each sample."""
    from nvidia.dali import fn, types

    return fn.random.coin_flip(probability=p, dtype=types.BOOL)


def _dali_uniform(middle: float, strength: float) -> Any:
    from nvidia.dali import fn

    return fn.random.uniform(range=(middle - strength, middle + strength))


def _image_by_image(
    decode: Callable[[bytes], Any], view_a: Callable[[Any], Tensor], view_b: Callable[[Any], Tensor]
) -> Views:
    """The way of a dataset and its loader: decode once, transform twice, collate."""

    def make_views(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        a, b = [], []
        for data in encoded:
            image = decode(data)
            a.append(view_a(image))
            b.append(view_b(image))
        return torch.stack(a), torch.stack(b)

    return make_views


def _in_batches(size: int, make_batch: Callable[[Sequence[bytes]], tuple[Tensor, Tensor]]) -> Views:
    def make_views(encoded: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        batches = [make_batch(encoded[i : i + size]) for i in range(0, len(encoded), size)]
        if len(batches) == 1:
            return batches[0]
        a, b = zip(*batches, strict=True)
        return torch.cat(a), torch.cat(b)

    return make_views


def _decode_with_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _decode_with_torchvision(data: bytes) -> Tensor:
    """uint8 [3, H, W]."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


_SPECS = (
    PeerSpec(
        name="authors' transform (Pillow)",
        module="torchvision",
        packages=("torchvision", "pillow"),
        differs="",
        make=_pillow,
    ),
    PeerSpec(
        name="lightly's BYOL transform",
        module="lightly.transforms",
        packages=("lightly", "torchvision", "pillow"),
        differs="bilinear crops",
        make=_lightly,
    ),
    PeerSpec(
        name="torchvision v2 on tensors",
        module="torchvision",
        packages=("torchvision", "torch"),
        differs="blur kernel cut at 6 pixels, borders reflected",
        make=_torchvision,
    ),
    PeerSpec(
        name="DALI's own operators",
        module="nvidia.dali",
        packages=("nvidia-dali-cuda130",),
        differs=(
            "jitter in a fixed order, contrast around mid-grey instead of the image's mean, "
            "hue as a linear (YIQ) rotation, blur borders reflected"
        ),
        make=_dali,
    ),
    PeerSpec(
        name="kornia",
        module="kornia.augmentation",
        packages=("kornia", "torchvision", "torch"),
        differs=(
            "crops without antialiasing, one order of the jitter per batch, "
            "blur kernel cut at 6 pixels"
        ),
        make=_kornia,
    ),
)
