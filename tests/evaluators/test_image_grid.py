"""Sample grids."""

import numpy as np

from scaling.evaluators.image_grid import first_frames, grid


def test_a_grid_goes_row_by_row_on_white() -> None:
    images = np.stack([np.full((2, 3, 1), i, np.uint8) for i in range(5)])
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (1 + 3 * 3, 1 + 2 * 4, 1)
    assert [sheet[1, 1, 0], sheet[1, 5, 0], sheet[4, 1, 0], sheet[4, 5, 0], sheet[7, 1, 0]] == [0, 1, 2, 3, 4]
    assert sheet[7, 5, 0] == 255 and (sheet[0] == 255).all()


def test_a_clip_is_shown_by_its_first_frame() -> None:
    clips = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 6, 1), np.uint8)
    np.testing.assert_array_equal(first_frames(clips), grid(clips[:, 0]))
    np.testing.assert_array_equal(first_frames(clips[:, 0]), grid(clips[:, 0]))
