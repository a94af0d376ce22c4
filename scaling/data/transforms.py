"""Image transforms of the loader: uint8 [H, W, C] in and out, C = 1 or 3, with Pillow and NumPy.

Each gets the example's own random generator, and the side to crop to where it crops. Of a video [T, H, W, C]
every frame is transformed alike.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scaling.data.augment import AUTOAUGMENT, INCREASING, rand_augment, random_erasing, with_pillow
from scaling.errors import UserError

# What is drawn: second word of every key of the data, so that no two of these share a stream.
EPOCH = 0  # the order of examples (pipeline.py)
AUGMENT = 1
PLACE = 2  # where a clip begins
ORDER = 3  # of shuffled frames
HELD = 4  # the one clip of an example that evaluation sees
CAPTION = 5  # which of an image's


INTERPOLATIONS = {  # how pixels are read between others; all but nearest average where an image shrinks
    name.lower(): getattr(Image.Resampling, name)
    for name in ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
}
BICUBIC = Image.Resampling.BICUBIC


class Transform(NamedTuple):
    """A transform that a config names: NAME, or NAME(NUMBER, INTERPOLATION) where it takes them."""

    apply: Callable[..., np.ndarray]  # (image, generator, size); of central crops `offset` too
    random: bool  # draws from the generator
    sized: bool  # gives images of side image_size
    number: str = ""  # the argument that NUMBER is
    resamples: bool = False  # takes an INTERPOLATION, bicubic by default

    def options(self) -> dict[str, Any]:
        """Returns what was given between the parentheses, by the names of `apply`'s arguments."""
        return getattr(self.apply, "keywords", {})


def _resize(image: np.ndarray, height: int, width: int, resample: Image.Resampling = BICUBIC) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return with_pillow(image, lambda picture: picture.resize((width, height), resample))


def _scale_short_side(image: np.ndarray, size: int, short: float, resample: Image.Resampling) -> np.ndarray:
    """Resizes the short side to `short` pixels, or to size / short for a share of at most 1.

    The long side is rounded down, as torchvision's Resize has it.
    """
    height, width = image.shape[:2]
    target, least = int(size / short) if short <= 1 else int(short), min(height, width)
    return _resize(image, target * height // least, target * width // least, resample)


def _central(image: np.ndarray, size: int, offset: float | None = None) -> np.ndarray:
    """Returns the central square; with an `offset` in [0, 1] one that lies there along the long side.

    Half a pixel is rounded to the even one, as torchvision's CenterCrop has it.
    """
    down, right = image.shape[0] - size, image.shape[1] - size
    top, left = round(down / 2), round(right / 2)
    if offset is not None and down > right:
        top = round(offset * down)
    elif offset is not None:
        left = round(offset * right)
    return image[top : top + size, left : left + size]


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    area: float = 0.08,
    resample: Image.Resampling = BICUBIC,
) -> np.ndarray:
    """A random share of the image, from `area` to all of it, with a ratio of 3/4 to 4/3, resized.

    Szegedy et al. 2015 (arXiv:1409.4842), section 6. The box is cut out before it is resized.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = height * width * rng.uniform(area, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return _resize(image[top : top + h, left : left + w], size, size, resample)
    return center_crop(image, rng, size, 1.0, resample=resample)  # a very long image: no such box fits


def flip(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Left and right exchanged in half of the cases."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def pad_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """4 black pixels on each side, then a random crop of the image's own size (He et al. 2016, sec. 4.2)."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 8, width + 8, image.shape[2]), np.uint8)  # np.pad takes ten times as long
    padded[4:-4, 4:-4] = image
    top, left = rng.integers(9), rng.integers(9)
    return padded[top : top + height, left : left + width]


def random_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    short: float = 0.875,
    resample: Image.Resampling = BICUBIC,
) -> np.ndarray:
    """The short side resized (`_scale_short_side`), then a random square: of videos 256 pixels, then 224."""
    scaled = _scale_short_side(image, size, short, resample)
    height, width = scaled.shape[:2]
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return scaled[top : top + size, left : left + size]


def center_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    short: float = 0.875,
    resample: Image.Resampling = BICUBIC,
    offset: float | None = None,
) -> np.ndarray:
    """The short side resized (`_scale_short_side`), then the central square, or another (`_central`).

    To the pixel torchvision's Resize and CenterCrop, which timm, CLIP, Swin and DeiT call.
    """
    return _central(_scale_short_side(image, size, short, resample), size, offset)


def resize(
    image: np.ndarray, rng: np.random.Generator, size: int, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """The whole image made square, whatever its ratio."""
    return _resize(image, size, size, resample)


def adm_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """The crop of ADM's and DiT's ImageNet (Dhariwal & Nichol 2021).

    Halved with a box filter while the short side is at least 2·size, then bicubic, then the central square;
    both sides are rounded to the nearest pixel, and half a pixel of the corner down.
    """
    while min(image.shape[:2]) >= 2 * size:
        image = _resize(image, image.shape[0] // 2, image.shape[1] // 2, Image.Resampling.BOX)
    height, width = image.shape[:2]
    scale = size / min(height, width)
    image = _resize(image, round(height * scale), round(width * scale))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


TRANSFORMS: dict[str, Transform] = {
    # NUMBER: the least share of the area.
    "random_resized_crop": Transform(
        random_resized_crop, random=True, sized=True, number="area", resamples=True
    ),
    # NUMBER: the part of the short side that the square keeps, or what the side is resized to, in pixels.
    "random_crop": Transform(random_crop, random=True, sized=True, number="short", resamples=True),
    "center_crop": Transform(center_crop, random=False, sized=True, number="short", resamples=True),
    "resize": Transform(resize, random=False, sized=True, resamples=True),
    "adm_crop": Transform(adm_crop, random=False, sized=True),
    "flip": Transform(flip, random=True, sized=False),
    "pad_crop": Transform(pad_crop, random=True, sized=False),
    # Two operations at magnitude 10, and DeiT's and Swin's two at 9 with a standard deviation of 0.5.
    "randaugment": Transform(functools.partial(rand_augment, policy=AUTOAUGMENT), random=True, sized=False),
    "randaugment_deit": Transform(
        functools.partial(rand_augment, policy=INCREASING), random=True, sized=False
    ),
    "random_erasing": Transform(random_erasing, random=True, sized=False),
}
FORMER = {"center_crop_90": "center_crop(0.9)", "center_crop_100": "center_crop(1)"}


@functools.cache
def named(text: str) -> Transform:
    """Returns the transform that `text` names: "flip", "center_crop(0.9)", "center_crop(256, bilinear)".

    Raises: UserError for one that is not there, and for arguments that it does not take.
    """
    if text in FORMER:
        raise UserError(f"{text!r} is now called {FORMER[text]!r}")
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text)
    if match is None or match[1] not in TRANSFORMS:
        raise UserError(f"{text!r} is not a transform; choose from {', '.join(TRANSFORMS)}")
    chosen, options = TRANSFORMS[match[1]], {}
    for word in match[2].split(",") if match[2] is not None else ():
        key, value = _argument(text, chosen, word.strip())
        if key in options:
            raise UserError(f"{text!r}: has {key} twice")
        options[key] = value
    return chosen._replace(apply=functools.partial(chosen.apply, **options)) if options else chosen


def _argument(text: str, chosen: Transform, word: str) -> tuple[str, Any]:
    """The keyword and the value that a word between the parentheses stands for."""
    if chosen.resamples and word in INTERPOLATIONS:
        return "resample", INTERPOLATIONS[word]
    number = re.fullmatch(r"\d+(\.\d+)?", word)
    if chosen.number and number is not None and float(word) > 0:
        share = float(word) <= 1
        if share or (chosen.number == "short" and number[1] is None):
            return chosen.number, float(word)
    numbers = {"short": "a share in (0, 1], or pixels", "area": "a share in (0, 1]"}
    takes = [numbers[chosen.number]] if chosen.number else []
    takes += [f"one of {', '.join(INTERPOLATIONS)}"] if chosen.resamples else []
    raise UserError(f"{text!r}: {word!r} is not what it takes: {'; or '.join(takes) or 'no arguments'}")


def generators(seed: int, positions: np.ndarray, purpose: int = AUGMENT) -> Iterator[np.random.Generator]:
    """A generator for each position of the training stream: a function of (seed, purpose, position) alone.

    One Philox is moved from counter to counter, since making one takes seven times as long; so a
    generator must be used before the next is asked for.
    """
    bits = np.random.Philox(key=(seed, purpose))
    rng, state = np.random.Generator(bits), bits.state
    for position in positions:
        state["state"]["counter"][:] = (0, 0, position, 0)  # 2^128 draws apart
        bits.state = state
        yield rng


def transform(
    images: Iterable[np.ndarray], names: Sequence[str], size: int, seed: int, positions: np.ndarray
) -> list[np.ndarray]:
    """Each image through the named transforms, with the generator of its position; of a video each frame."""
    steps = [named(name).apply for name in names]

    def one(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for step in steps:
            image = step(image, rng, size)
        return image

    results = []
    for image, rng in zip(images, generators(seed, positions), strict=True):
        results.append(one(image, rng) if image.ndim == 3 else _alike(image, rng, one))
    return results


def _alike(
    video: np.ndarray,
    rng: np.random.Generator,
    one: Callable[[np.ndarray, np.random.Generator], np.ndarray],
) -> np.ndarray:
    """Every frame with the same random numbers."""
    state, frames = rng.bit_generator.state, []
    for frame in video:
        rng.bit_generator.state = state
        frames.append(one(frame, rng))
    return np.stack(frames)
