"""Augmentation that distorts: RandAugment and random erasing, with Pillow's own operations.

uint8 [H, W, C] in and out, C = 1 or 3. Everything random is drawn from the example's generator. Fill colours
are RGB; gray images are filled with their mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from scaling.errors import UserError

Colour = tuple[int, int, int]


def with_pillow(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Returns what `change` makes of an image, which it sees as a picture of mode L, RGB or RGBA.

    Raises: UserError for another number of channels.
    """
    if image.shape[-1] not in (1, 3, 4):
        raise UserError(f"an image of {image.shape}: transforms are of 1, 3 or 4 channels; leave them out")
    gray = image.shape[-1] == 1
    changed = np.asarray(change(Image.fromarray(image[..., 0] if gray else image)))
    return changed[..., None] if gray else changed


# --- operations: (picture, amount, how empty pixels are made) -> picture --------------------------


class Fill(NamedTuple):
    """How pixels are read between others, and what is seen beyond the border."""

    resample: Image.Resampling
    colour: Colour

    def of(self, picture: Image.Image) -> Colour | int:
        return self.colour if picture.mode == "RGB" else round(sum(self.colour) / 3)


Apply = Callable[[Image.Image, float, Fill], Image.Image]


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Pixel (x, y) is taken from (a x + b y + c, d x + e y + f)."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, fill.resample, fillcolor=fill.of(picture)
    )


def _rotate(picture: Image.Image, degrees: float, fill: Fill) -> Image.Image:
    return picture.rotate(degrees, fill.resample, fillcolor=fill.of(picture))


def _shear_x(picture: Image.Image, slope: float, fill: Fill) -> Image.Image:
    return _affine(picture, (1, slope, 0, 0, 1, 0), fill)


def _shear_y(picture: Image.Image, slope: float, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, 0, slope, 1, 0), fill)


def _translate_x(picture: Image.Image, share: float, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, share * picture.width, 0, 1, 0), fill)


def _translate_y(picture: Image.Image, share: float, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, share * picture.height), fill)


def _posterize(picture: Image.Image, bits: float, fill: Fill) -> Image.Image:
    """The highest bits of every value; none is black. Pillow's own refuses to keep none."""
    kept = 256 - 2 ** (8 - int(bits))
    return picture.point([value & kept for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture: Image.Image, amount: float, fill: Fill) -> Image.Image:
    """The darker half is made brighter."""
    table = [min(value + int(amount), 255) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Apply:
    return lambda picture, factor, fill: kind(picture).enhance(factor)


APPLY: dict[str, Apply] = {
    "autocontrast": lambda picture, _, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _, fill: ImageOps.equalize(picture),
    "invert": lambda picture, _, fill: ImageOps.invert(picture),
    "rotate": _rotate,  # degrees
    "posterize": _posterize,  # bits
    "solarize": lambda picture, threshold, fill: ImageOps.solarize(picture, int(threshold)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),  # factors: 1 changes nothing
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,  # shares of the side
    "translate_y": _translate_y,
}


# --- RandAugment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A form of RandAugment: `count` of the operations, each any of them, at one magnitude of 10.

    `amounts` has each operation's amount as a function of magnitude / 10 and of a sign, -1 or 1. The
    magnitude is drawn for each operation from N(magnitude, deviation^2) within 0 and 10, and the operation
    is done with probability `chance`.
    """

    amounts: Mapping[str, Callable[[float, int], float]]
    fill: Fill
    magnitude: float
    deviation: float = 0.0
    chance: float = 1.0
    count: int = 2


def _none(level: float, sign: int) -> float:
    return 0.0


_GEOMETRY: dict[str, Callable[[float, int], float]] = {
    "rotate": lambda level, sign: sign * 30 * level,
    "shear_x": lambda level, sign: sign * 0.3 * level,
    "shear_y": lambda level, sign: sign * 0.3 * level,
}
_COLOURS = ("color", "contrast", "brightness", "sharpness")

# As in the released code of EfficientNet and Big Vision, "randaug(2, 10)": the amounts are AutoAugment's, so
# that at 10 a colour's factor is 1.9 and solarize does nothing. Their translation by 100 pixels and cutout of
# 80 are, for images of 224 pixels, these shares.
AUTOAUGMENT = Policy(
    amounts={
        "autocontrast": _none,
        "equalize": _none,
        "invert": _none,
        "posterize": lambda level, sign: int(4 * level),
        "solarize": lambda level, sign: int(256 * level),
        "solarize_add": lambda level, sign: int(110 * level),
        **dict.fromkeys(_COLOURS, lambda level, sign: 1.8 * level + 0.1),
        **_GEOMETRY,
        **dict.fromkeys(("translate_x", "translate_y"), lambda level, sign: sign * level * 100 / 224),
        "cutout": lambda level, sign: level * 80 / 224,
    },
    fill=Fill(Image.Resampling.NEAREST, (128, 128, 128)),
    magnitude=10.0,
)

# As in DeiT (Touvron et al. 2021, arXiv:2012.12877, table 9) and Swin, "rand-m9-mstd0.5-inc1": every amount
# grows with the magnitude, and half of the operations are left out.
INCREASING = Policy(
    amounts={
        "autocontrast": _none,
        "equalize": _none,
        "invert": _none,
        "posterize": lambda level, sign: 4 - int(4 * level),
        "solarize": lambda level, sign: 256 - int(256 * level),
        "solarize_add": lambda level, sign: int(110 * level),
        **dict.fromkeys(_COLOURS, lambda level, sign: max(0.1, 1.0 + sign * 0.9 * level)),
        **_GEOMETRY,
        **dict.fromkeys(("translate_x", "translate_y"), lambda level, sign: sign * 0.45 * level),
    },
    fill=Fill(Image.Resampling.BICUBIC, (124, 116, 104)),  # ImageNet's mean
    magnitude=9.0,
    deviation=0.5,
    chance=0.5,
)


def rand_augment(image: np.ndarray, rng: np.random.Generator, size: int, policy: Policy) -> np.ndarray:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719, algorithm 1): operations chosen at random."""
    names = list(policy.amounts)
    for _ in range(policy.count):
        name = names[rng.integers(len(names))]
        if rng.random() >= policy.chance:
            continue
        level = np.clip(policy.magnitude + policy.deviation * rng.standard_normal(), 0.0, 10.0) / 10.0
        amount = policy.amounts[name](float(level), 1 if rng.random() < 0.5 else -1)
        if name == "cutout":
            image = _cutout(image, rng, amount, policy.fill.colour)
        else:
            image = with_pillow(image, lambda p, n=name, a=amount: APPLY[n](p, a, policy.fill))  # type: ignore[misc]
    return image


def _cutout(image: np.ndarray, rng: np.random.Generator, share: float, colour: Colour) -> np.ndarray:
    """A box of one colour with these shares of H and W, around any pixel (DeVries & Taylor 2017)."""
    height, width, channels = image.shape
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height, half_width = int(height * share / 2), int(width * share / 2)
    cut = image.copy()
    box = slice(max(y - half_height, 0), y + half_height), slice(max(x - half_width, 0), x + half_width)
    cut[box] = colour if channels == 3 else round(sum(colour) / 3)
    return cut


# --- random erasing ------------------------------------------------------------------------------


def random_erasing(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A box of noise in a quarter of the images (Zhong et al. 2020, arXiv:1708.04896, algorithm 1).

    It has 2 % to a third of the area and a ratio of 0.3 to 1 / 0.3, as in DeiT's and Swin's recipes; every
    byte is uniform (the paper's RE-R).
    """
    if rng.random() >= 0.25:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            erased = image.copy()
            erased[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, channels), np.uint8)
            return erased
    return image
