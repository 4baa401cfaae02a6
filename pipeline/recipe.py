"""Recipes: which distortions a view gets, and how strong they are.

`barlow_twins` has the two views of the paper. `draw.py` draws the parameters of each sample from a
recipe; the decoders and `distort.py` apply them.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # the weights of a grey level: torchvision's rounding of ITU-R 601

# The operations of the colour jitter.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to a square.

    The box is drawn as in torchvision and resized like Pillow's `crop(box).resize(size)`.
    """

    area: tuple[float, float] = (0.08, 1.0)  # as fractions of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class CenterCrop:
    """torchvision's Resize + CenterCrop: the short side to `resize` pixels, then the centre."""

    resize: int = 256
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class WholeImage:
    """The short side to `resize` pixels, then the whole image to a square. VISSL's for VOC07."""

    resize: int = 256
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class View:
    """The distortions of one crop, in this order. The defaults do nothing.

    See `barlow_twins` for the values of the paper.
    """

    flip_p: float = 0.0
    jitter_p: float = 0.0
    brightness: float = 0.0  # factor uniform in [max(0, 1 - b), 1 + b]
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # shift uniform in [-h, h], in turns of the colour wheel
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # uniform, in pixels of the crop
    solarize_p: float = 0.0  # inverts values of 128 and more


@dataclass(frozen=True)
class Recipe:
    """How an encoded image becomes views, each a square of `size` pixels.

    Raises:
        ValueError: If `size` is not positive, or the crop would leave the resized image.
    """

    size: int
    crop: RandomResizedCrop | CenterCrop | WholeImage
    views: tuple[View, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a view needs at least 1 pixel")
        if isinstance(self.crop, CenterCrop) and self.crop.resize < self.size:
            raise ValueError(
                f"resize {self.crop.resize} is below size {self.size}: "
                "the crop would be larger than the image"
            )


def barlow_twins(
    size: int = 224,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    blur_p: tuple[float, float] = (1.0, 0.1),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_p: tuple[float, float] = (0.0, 0.2),
) -> Recipe:
    """The two views of Zbontar et al. 2021, appendix A.

    They differ only in blur and solarisation: the pairs are the probabilities of view a and b.
    """
    views = tuple(
        View(
            flip_p=0.5,
            jitter_p=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            gray_p=0.2,
            blur_p=blur,
            blur_sigma=blur_sigma,
            solarize_p=solarize,
        )
        for blur, solarize in zip(blur_p, solarize_p, strict=True)
    )
    return Recipe(size, RandomResizedCrop(area), views)


def center_view(size: int = 224, resize: int | None = None) -> Recipe:
    """The usual test view: one undistorted centre crop. `resize` defaults to size * 256 / 224."""
    return Recipe(size, CenterCrop(resize or _default_resize(size)), (View(),))


def crop_view(size: int = 224, area: tuple[float, float] = (0.08, 1.0)) -> Recipe:
    """The usual training view of classifiers: one random resized crop, flipped at random."""
    return Recipe(size, RandomResizedCrop(area, interpolation="bilinear"), (View(flip_p=0.5),))


def whole_view(size: int = 224, resize: int | None = None) -> Recipe:
    """The test view for VOC07: one whole image. `resize` defaults to size * 256 / 224."""
    return Recipe(size, WholeImage(resize or _default_resize(size)), (View(),))


def _default_resize(size: int) -> int:
    return round(size * 256 / 224)
