"""Augmentations that distort: RandAugment and random erasing, with Pillow's own operations.

Images are uint8 [H, W, C] in and out, C = 1 or 3. All random numbers come from the example's generator. Fill
colours are RGB; grey images are filled with the mean of the three values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from scaling.errors import UserError

Colour = tuple[int, int, int]


def with_pillow(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Returns an image after `change`, which gets it as a Pillow picture of mode L, RGB or RGBA.

    Raises:
        UserError: if the image does not have 1, 3 or 4 channels.
    """
    if image.shape[-1] not in (1, 3, 4):
        raise UserError(f"an image of {image.shape}: transforms are of 1, 3 or 4 channels; leave them out")
    is_grey = image.shape[-1] == 1
    changed = np.asarray(change(Image.fromarray(image[..., 0] if is_grey else image)))
    return changed[..., None] if is_grey else changed


# --- operations: (picture, amount, fill) -> picture ------------------------------------------------


class Fill(NamedTuple):
    """A resampling filter, and the colour of pixels from beyond the border."""

    resample: Image.Resampling
    colour: Colour

    def of(self, picture: Image.Image) -> Colour | int:
        """Returns the colour as a pixel of this picture's mode."""
        return self.colour if picture.mode == "RGB" else round(sum(self.colour) / 3)


Apply = Callable[[Image.Image, float, Fill], Image.Image]


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Takes pixel (x, y) from (a x + b y + c, d x + e y + f), where `matrix` is (a, b, c, d, e, f)."""
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
    """Keeps the highest `bits` of every value; 0 bits, which Pillow's own function refuses, is black."""
    mask = 256 - 2 ** (8 - int(bits))
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture: Image.Image, amount: float, fill: Fill) -> Image.Image:
    """Adds `amount` to the values of the darker half, below 128."""
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
    "color": _enhance(ImageEnhance.Color),  # this and the next three: factor, where 1 changes nothing
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,  # share of the side, as translate_y
    "translate_y": _translate_y,
}


# --- RandAugment ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A form of RandAugment: `count` operations, each chosen from all of them, at a magnitude of 0 to 10.

    The magnitude of each operation is drawn from N(magnitude, deviation^2) and clipped to [0, 10].
    """

    amounts: Mapping[str, Callable[[float, int], float]]  # (magnitude / 10, sign -1 or 1) -> amount
    fill: Fill
    magnitude: float  # mean magnitude
    deviation: float = 0.0  # standard deviation of the magnitude
    chance: float = 1.0  # probability that a chosen operation is applied
    count: int = 2  # operations per image


def _none(level: float, sign: int) -> float:
    return 0.0


_GEOMETRY: dict[str, Callable[[float, int], float]] = {
    "rotate": lambda level, sign: sign * 30 * level,
    "shear_x": lambda level, sign: sign * 0.3 * level,
    "shear_y": lambda level, sign: sign * 0.3 * level,
}
_COLOURS = ("color", "contrast", "brightness", "sharpness")

# As in the released code of EfficientNet and Big Vision, "randaug(2, 10)". The amounts are AutoAugment's: at
# magnitude 10 a colour's factor is 1.9, and solarize does nothing. Their translation by 100 pixels and cutout
# of 80 are given as shares of an image of 224 pixels.
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

# As in DeiT (Touvron et al. 2021, arXiv:2012.12877, table 9) and Swin, "rand-m9-mstd0.5-inc1": operations
# become stronger with the magnitude, and each is skipped with probability 1/2.
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
    """Applies RandAugment (Cubuk et al. 2020, arXiv:1909.13719, algorithm 1): operations chosen at random."""
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
    """Paints a box of `share` of H and of W in one colour, around a random pixel (DeVries & Taylor 2017)."""
    height, width, channels = image.shape
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height, half_width = int(height * share / 2), int(width * share / 2)
    painted = image.copy()
    box = slice(max(y - half_height, 0), y + half_height), slice(max(x - half_width, 0), x + half_width)
    painted[box] = colour if channels == 3 else round(sum(colour) / 3)
    return painted


# --- random erasing ------------------------------------------------------------------------------


def random_erasing(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Replaces a box by noise with probability 1/4 (Zhong et al. 2020, arXiv:1708.04896, algorithm 1).

    The box has 2 % to a third of the area and an aspect ratio of 0.3 to 1 / 0.3, as in DeiT's and Swin's
    recipes; every byte of the noise is uniform (the paper's RE-R).
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
