"""Sample grids."""

import numpy as np

from scaling.evaluators.image_grid import grid


def test_a_grid_goes_row_by_row_on_white() -> None:
    images = np.stack([np.full((2, 3, 1), i, np.uint8) for i in range(5)])
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (1 + 3 * 3, 1 + 2 * 4, 1)
    assert [sheet[1, 1, 0], sheet[1, 5, 0], sheet[4, 1, 0], sheet[4, 5, 0], sheet[7, 1, 0]] == [0, 1, 2, 3, 4]
    assert sheet[7, 5, 0] == 255 and (sheet[0] == 255).all()
