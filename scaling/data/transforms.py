"""Image transforms of the loader: uint8 [H, W, C] in and out, C = 1 or 3, with Pillow and NumPy.

Each transform gets the example's own random generator, and the side of the crop if it crops. All frames of a
video [T, H, W, C] are transformed alike.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scaling import former_names
from scaling.data.augment import AUTOAUGMENT, INCREASING, rand_augment, random_erasing, with_pillow
from scaling.errors import UserError

# Purposes of random streams: the second word of every Philox key in `data`, so that no two share a stream.
EPOCH = 0  # order of the examples (pipeline.py)
AUGMENT = 1  # random transforms
PLACE = 2  # start of a clip
ORDER = 3  # order of shuffled frames
HELD = 4  # the one clip of an example that evaluation sees
CAPTION = 5  # choice among an image's captions


INTERPOLATIONS = {  # resampling filters by name; all but nearest average pixels where an image shrinks
    name.lower(): getattr(Image.Resampling, name)
    for name in ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
}
BICUBIC = Image.Resampling.BICUBIC


class Transform(NamedTuple):
    """A transform as a config names it: NAME, or NAME(NUMBER, INTERPOLATION) if it takes arguments."""

    apply: Callable[..., np.ndarray]  # (image, generator, size), for central crops also `offset`
    random: bool  # whether it draws from the generator
    sized: bool  # whether its images have sides of image_size
    number: str = ""  # name of the parameter that NUMBER sets
    resamples: bool = False  # whether it takes an INTERPOLATION, bicubic by default

    def options(self) -> dict[str, Any]:
        """Returns the arguments between the parentheses, by the names of `apply`'s parameters."""
        return getattr(self.apply, "keywords", {})


def _resize(image: np.ndarray, height: int, width: int, resample: Image.Resampling = BICUBIC) -> np.ndarray:
    """Returns the image resized to height x width; an image of that size is returned as it is."""
    if image.shape[:2] == (height, width):
        return image
    return with_pillow(image, lambda picture: picture.resize((width, height), resample))


def _scale_short_side(image: np.ndarray, size: int, short: float, resample: Image.Resampling) -> np.ndarray:
    """Resizes the short side to `short` pixels, or to size / short if `short` is a share of at most 1.

    The long side is rounded down, as in torchvision's Resize.
    """
    height, width = image.shape[:2]
    target, shorter = int(size / short) if short <= 1 else int(short), min(height, width)
    return _resize(image, target * height // shorter, target * width // shorter, resample)


def _central(image: np.ndarray, size: int, offset: float | None = None) -> np.ndarray:
    """Returns the central square, or the square at `offset` in [0, 1] along the long side.

    Half a pixel is rounded to even, as in torchvision's CenterCrop.
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
    """Crops a box of a random share of the area, from `area` to 1, and aspect ratio 3/4 to 4/3; resizes it.

    Szegedy et al. 2015 (arXiv:1409.4842), section 6.
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
    """Mirrors the image left to right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def pad_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Pads 4 black pixels on each side, then crops the original size at random (He et al. 2016, sec. 4.2)."""
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
    """Resizes the short side (`_scale_short_side`), then crops a random square.

    The default, 0.875, resizes to 256 pixels for crops of 224, as is usual for videos.
    """
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
    """Resizes the short side (`_scale_short_side`), then crops the central square, or another (`_central`).

    Agrees to the pixel with torchvision's Resize and CenterCrop, which timm, CLIP, Swin and DeiT use.
    """
    return _central(_scale_short_side(image, size, short, resample), size, offset)


def resize(
    image: np.ndarray, rng: np.random.Generator, size: int, resample: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Resizes the whole image to a square, whatever its aspect ratio."""
    return _resize(image, size, size, resample)


def adm_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Crops as for the ImageNet of ADM and DiT (Dhariwal & Nichol 2021).

    The image is halved with a box filter while its short side is at least 2·size, resized with a bicubic
    filter, and cropped to the central square. Both sides are rounded to the nearest pixel; the corner's
    position is rounded down.
    """
    while min(image.shape[:2]) >= 2 * size:
        image = _resize(image, image.shape[0] // 2, image.shape[1] // 2, Image.Resampling.BOX)
    height, width = image.shape[:2]
    scale = size / min(height, width)
    image = _resize(image, round(height * scale), round(width * scale))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


TRANSFORMS: dict[str, Transform] = {
    # NUMBER: minimum share of the area.
    "random_resized_crop": Transform(
        random_resized_crop, random=True, sized=True, number="area", resamples=True
    ),
    # NUMBER: share of the short side that the square keeps, or that side's new length in pixels.
    "random_crop": Transform(random_crop, random=True, sized=True, number="short", resamples=True),
    "center_crop": Transform(center_crop, random=False, sized=True, number="short", resamples=True),
    "resize": Transform(resize, random=False, sized=True, resamples=True),
    "adm_crop": Transform(adm_crop, random=False, sized=True),
    "flip": Transform(flip, random=True, sized=False),
    "pad_crop": Transform(pad_crop, random=True, sized=False),
    # Two operations at magnitude 10; DeiT's and Swin's two at magnitude 9 with a standard deviation of 0.5.
    "randaugment": Transform(functools.partial(rand_augment, policy=AUTOAUGMENT), random=True, sized=False),
    "randaugment_deit": Transform(
        functools.partial(rand_augment, policy=INCREASING), random=True, sized=False
    ),
    "random_erasing": Transform(random_erasing, random=True, sized=False),
}


@functools.cache
def named(text: str) -> Transform:
    """Returns the transform that `text` names: "flip", "center_crop(0.9)", "center_crop(256, bilinear)".

    Raises:
        UserError: if there is no such transform, or it does not take these arguments.
    """
    if text in former_names.VALUES:
        raise UserError(f"{text!r} is now called {former_names.VALUES[text]!r}")
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text)
    if match is None or match[1] not in TRANSFORMS:
        raise UserError(f"{text!r} is not a transform; choose from {', '.join(TRANSFORMS)}")
    plain, options = TRANSFORMS[match[1]], {}  # the transform without its arguments
    for word in match[2].split(",") if match[2] is not None else ():
        key, value = _parse_argument(text, plain, word.strip())
        if key in options:
            raise UserError(f"{text!r}: has {key} twice")
        options[key] = value
    return plain._replace(apply=functools.partial(plain.apply, **options)) if options else plain


def _parse_argument(text: str, plain: Transform, word: str) -> tuple[str, Any]:
    """Returns the keyword and the value that a word between the parentheses of `text` stands for."""
    if plain.resamples and word in INTERPOLATIONS:
        return "resample", INTERPOLATIONS[word]
    number = re.fullmatch(r"\d+(\.\d+)?", word)
    if plain.number and number is not None and float(word) > 0:
        is_share = float(word) <= 1
        if is_share or (plain.number == "short" and number[1] is None):
            return plain.number, float(word)
    numbers = {"short": "a share in (0, 1], or pixels", "area": "a share in (0, 1]"}
    forms = [numbers[plain.number]] if plain.number else []
    forms += [f"one of {', '.join(INTERPOLATIONS)}"] if plain.resamples else []
    raise UserError(f"{text!r}: {word!r} is not what it takes: {'; or '.join(forms) or 'no arguments'}")


def generators(seed: int, positions: np.ndarray, purpose: int = AUGMENT) -> Iterator[np.random.Generator]:
    """Yields a generator for each position of the training stream: a function of (seed, purpose, position).

    All are the same Philox, moved from counter to counter, since making a new one takes seven times as long.
    So each generator must be used before the next is taken.
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
    """Applies the named transforms to each image or video, with the generator of its position."""
    steps = [named(name).apply for name in names]

    def apply_all(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for step in steps:
            image = step(image, rng, size)
        return image

    results = []
    for image, rng in zip(images, generators(seed, positions), strict=True):
        results.append(apply_all(image, rng) if image.ndim == 3 else _transform_frames(image, rng, apply_all))
    return results


def _transform_frames(
    video: np.ndarray,
    rng: np.random.Generator,
    apply_all: Callable[[np.ndarray, np.random.Generator], np.ndarray],
) -> np.ndarray:
    """Transforms every frame of a video with the same random numbers."""
    state, frames = rng.bit_generator.state, []
    for frame in video:
        rng.bit_generator.state = state
        frames.append(apply_all(frame, rng))
    return np.stack(frames)
