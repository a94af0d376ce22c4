"""Sample grids as PNG files."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from scaling.files import write_atomic


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


def write_grid(path: Path, images: np.ndarray) -> None:
    """Writes a grid of images uint8 [N, H, W, 1 or 3] as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = grid(images)
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(buffer, "png")
    write_atomic(path, buffer.getvalue())
