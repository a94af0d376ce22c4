"""Image transforms of the loader: uint8 [H, W, C] in and out, C = 1 or 3, with Pillow and NumPy.

Each gets the example's own random generator, and the side to crop to where it crops. Of a video [T, H, W, C]
every frame is transformed alike.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from scaling.data.augment import AUTOAUGMENT, INCREASING, rand_augment, random_erasing, with_pillow

# What is drawn: second word of every key of the data, so that no two of these share a stream.
EPOCH = 0  # the order of examples (pipeline.py)
AUGMENT = 1
PLACE = 2  # where a clip begins
ORDER = 3  # of shuffled frames
HELD = 4  # the one clip of an example that evaluation sees
CAPTION = 5  # which of an image's


class Transform(NamedTuple):
    apply: Callable[..., np.ndarray]  # (image, generator, size); of central crops `offset` too
    random: bool  # draws from the generator
    sized: bool  # gives images of side image_size


def _resize(
    image: np.ndarray,
    height: int,
    width: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    box: tuple[int, int, int, int] | None = None,  # left, top, right, bottom
) -> np.ndarray:
    return with_pillow(image, lambda picture: picture.resize((width, height), resample, box=box))


def _scale_short_side(image: np.ndarray, short: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = short / min(height, width)
    return _resize(image, max(short, round(height * scale)), max(short, round(width * scale)))


def _central(image: np.ndarray, size: int, offset: float | None = None) -> np.ndarray:
    """The central square; with an `offset` in [0, 1] one that lies there along the long side."""
    down, right = image.shape[0] - size, image.shape[1] - size
    top, left = down // 2, right // 2
    if offset is not None and down > right:
        top = round(offset * down)
    elif offset is not None:
        left = round(offset * right)
    return image[top : top + size, left : left + size]


def random_resized_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random 8–100 % of the area, ratio 3/4–4/3, resized (Szegedy et al. 2015, arXiv 1409.4842, sec. 6)."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return _resize(image, size, size, box=(left, top, left + w, top + h))
    return center_crop(image, rng, size, fraction=1.0)  # a very long image: no such box fits


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


def random_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """The short side resized to size / 0.875, bicubic, then a random square (of videos: 256, then 224)."""
    scaled = _scale_short_side(image, int(size / 0.875))
    height, width = scaled.shape[:2]
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return scaled[top : top + size, left : left + size]


def center_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, fraction: float, offset: float | None = None
) -> np.ndarray:
    """The short side resized to size / fraction, bicubic, then the central square (or as `_central`)."""
    return _central(_scale_short_side(image, int(size / fraction)), size, offset)


def adm_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, offset: float | None = None
) -> np.ndarray:
    """The crop of ADM's and DiT's ImageNet (Dhariwal & Nichol 2021).

    Halved with a box filter while the short side is at least 2·size, then bicubic, then the central square.
    """
    while min(image.shape[:2]) >= 2 * size:
        image = _resize(image, image.shape[0] // 2, image.shape[1] // 2, Image.Resampling.BOX)
    return _central(_scale_short_side(image, size), size, offset)


TRANSFORMS: dict[str, Transform] = {
    "random_resized_crop": Transform(random_resized_crop, random=True, sized=True),
    "random_crop": Transform(random_crop, random=True, sized=True),
    "flip": Transform(flip, random=True, sized=False),
    "pad_crop": Transform(pad_crop, random=True, sized=False),
    # Two operations at magnitude 10, and DeiT's and Swin's two at 9 with a standard deviation of 0.5.
    "randaugment": Transform(functools.partial(rand_augment, policy=AUTOAUGMENT), random=True, sized=False),
    "randaugment_deit": Transform(
        functools.partial(rand_augment, policy=INCREASING), random=True, sized=False
    ),
    "random_erasing": Transform(random_erasing, random=True, sized=False),
    # The part of the image that evaluation keeps: ResNet 0.875; ViT and Swin 0.9; at 384 pixels all of it.
    "center_crop": Transform(functools.partial(center_crop, fraction=0.875), random=False, sized=True),
    "center_crop_90": Transform(functools.partial(center_crop, fraction=0.9), random=False, sized=True),
    "center_crop_100": Transform(functools.partial(center_crop, fraction=1.0), random=False, sized=True),
    "adm_crop": Transform(adm_crop, random=False, sized=True),
}


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
    steps = [TRANSFORMS[name].apply for name in names]

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
