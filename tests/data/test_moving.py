"""Moving digits: what a label means, and that one frame, or frames in any order, cannot tell the motion."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from scaling.data import Data, info, open_source
from scaling.data.sources.moving import MOTIONS, moved
from scaling.data.video import Video
from scaling.errors import UserError
from tests.support.data_files import write_idx

MOVING = Data(name="moving_mnist", video=Video(frames=8, stride=2))
NAMES = list(MOTIONS)


def test_what_a_batch_holds() -> None:
    found = info(MOVING)
    assert (found.name, found.num_classes, found.train_examples) == ("moving_mnist", 80, 4000)
    assert found.factors == {"item": 10, "motion": 8}
    source = open_source(MOVING, "test")
    columns = source.read(np.arange(1000))
    assert columns["image"].shape == (1000, 8, 28, 28, 1) and columns["image"].dtype == np.uint8
    digits = open_source(Data(name="mnist"), "test").read(np.arange(1000))
    np.testing.assert_array_equal(columns["label"] // 8, digits["label"])
    assert set((columns["label"] % 8).tolist()) == set(range(8))
    # Every frame holds its own digit whole, shifted around the edges: the same pixels, elsewhere.
    np.testing.assert_array_equal(
        np.sort(columns["image"].reshape(1000, 8, -1)),
        np.sort(digits["image"].reshape(1000, 1, -1)).repeat(8, 1),
    )


def test_a_digit_moves_as_its_label_says() -> None:
    columns = open_source(MOVING, "test").read(np.arange(64))
    for clip, label in zip(columns["image"], columns["label"], strict=True):
        down, right = MOTIONS[NAMES[label % 8]]
        for before, after in itertools.pairwise(clip):
            np.testing.assert_array_equal(np.roll(before, (2 * down, 2 * right), (0, 1)), after)


def test_one_frame_is_anywhere_whatever_the_motion() -> None:
    """Over all starts, frame t of one motion shows a pixel as often in each place as of any other motion."""
    dot = np.zeros((1, 5, 5, 1), np.uint8)
    dot[0, 1, 2] = 1
    tops, lefts = (axis.ravel() for axis in np.mgrid[0:5, 0:5])
    clips = [
        moved(dot.repeat(25, 0), np.full(25, motion), tops, lefts, frames=4, stride=1) for motion in range(8)
    ]
    for each in clips:
        assert (each.sum(axis=0) == 1).all()  # of the 25 starts one has the dot here, at every time
    # In any order, the frames of a motion are those of the opposite motion.
    for there, back in ((0, 1), (2, 3), (4, 5), (6, 7)):
        sets = [
            {frozenset(np.argmax(clip.reshape(4, -1), 1).tolist()) for clip in clips[m]}
            for m in (there, back)
        ]
        assert sets[0] == sets[1]


def test_training_draws_new_clips_and_evaluation_never_does() -> None:
    source = open_source(MOVING, "train")
    rows = np.arange(400)
    first = source.read(rows)
    np.testing.assert_array_equal(first["image"], open_source(MOVING, "train").read(rows)["image"])
    drawn, again = (source.read_train(rows, 3, rows) for _ in range(2))
    np.testing.assert_array_equal(drawn["image"], again["image"])
    later = source.read_train(rows, 3, rows + 4000)
    np.testing.assert_array_equal(drawn["label"] // 8, later["label"] // 8)
    assert 0.05 < np.mean(drawn["label"] == later["label"]) < 0.2  # 1/8 by chance
    one = np.concatenate(
        [source.read_train(rows[i : i + 1], 3, rows[i : i + 1])["image"] for i in range(400)]
    )
    np.testing.assert_array_equal(one, drawn["image"])  # whatever the batch


def test_garments_move_too(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.ones((6, 28, 28), np.uint8), pack=True)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([3, 1, 4, 1, 5, 9], np.uint8), pack=True)
    data = Data(name="moving_fashion_mnist", data_dir=str(tmp_path))
    assert info(data).name == "moving_fashion_mnist" and info(data).image_shape == (8, 28, 28, 1)
    labels = open_source(data, "train").read(np.arange(6))["label"]
    assert (labels // 8).tolist() == [3, 1, 4, 1, 5, 9]


def test_flips_are_refused() -> None:
    with pytest.raises(UserError, match=r"train_transforms=\('flip',\): 'flip' turns the motions") as error:
        Data(name="moving_mnist", train_transforms=("flip",))
    assert "\n" not in str(error.value)
