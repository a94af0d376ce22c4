"""Sample grids as PNG files; those of clips are animated."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from scaling.files import make_folder, write_atomic

FRAME_MS = 125  # milliseconds that a frame of a clip is shown


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arranges images uint8 [N, H, W, C] in one picture uint8 [H', W', C], row by row, on white."""
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def first_frames(images: np.ndarray) -> np.ndarray:
    """Arranges images, or the first frames of clips [N, T, H, W, C], in one picture uint8 [H', W', C]."""
    return grid(images[:, 0] if images.ndim == 5 else images)


def write_grid(path: Path, images: np.ndarray) -> None:
    """Writes a grid of images uint8 [N, H, W, 1 or 3], or clips [N, T, H, W, 1 or 3], as a PNG file."""
    make_folder(path.parent)
    frames = np.moveaxis(images, 1, 0) if images.ndim == 5 else images[None]  # [T, N, H, W, C]
    first, *others = (_picture(grid(frame)) for frame in frames)
    animation = dict(save_all=True, append_images=others, duration=FRAME_MS, loop=0) if others else {}
    buffer = io.BytesIO()
    first.save(buffer, "png", **animation)
    write_atomic(path, buffer.getvalue())


def _picture(sheet: np.ndarray) -> Image.Image:
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
