"""Clips: where they begin, frames treated alike, shuffled frames, and views that count every example once."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling.data import Data, eval_batches, open_source, open_views, train_batches, view_batches
from scaling.data.transforms import transform
from scaling.data.video import Sampled, Video, begin
from scaling.errors import UserError
from tests.support.shardings import sharding


def test_clips_begin_anywhere_that_fits() -> None:
    assert [begin(place, 9, 4) for place in (0, 0.5, 1)] == [0, 3, 5]
    assert begin(0.999, 4, 4) == begin(0, 4, 4) == 0
    starts = [begin(place, 9, 4) for place in np.random.default_rng(0).random(6000)]
    assert (abs(np.bincount(starts, minlength=6) - 1000) < 150).all()
    assert Video(frames=32, stride=2).span == 63


def test_training_draws_the_clip_by_seed_and_position(counting: Data) -> None:
    source = open_source(counting, "train")
    assert isinstance(source, Sampled)
    rows = np.zeros(300, int)
    drawn = source.read_train(rows, 0, np.arange(300))["image"]
    assert set(drawn[:, 0, 0, 0, 1].tolist()) == set(range(6))
    np.testing.assert_array_equal(source.read_train(rows[7:9], 0, np.arange(7, 9))["image"], drawn[7:9])
    assert (source.read(np.arange(5))["image"][:, 0, 0, 0, 1] == 3).all()  # evaluation: the middle


def test_all_frames_are_transformed_alike() -> None:
    names = ("random_resized_crop", "flip", "pad_crop")
    frame = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
    videos = np.stack([frame] * 6)[None].repeat(5, 0)  # [5, T, H, W, C]
    results = transform(videos, names, 8, 0, np.arange(5))
    for video, image in zip(results, transform(videos[:, 0], names, 8, 0, np.arange(5)), strict=True):
        for each in video:
            np.testing.assert_array_equal(each, image)
    assert len({video.tobytes() for video in results}) == 5


def test_where_a_clip_begins_says_nothing_of_its_crop(counting: Data) -> None:
    data = dataclasses.replace(counting, train_transforms=("random_crop",), batch_size=400)
    batch = next(train_batches(data, 0, 0, sharding(8, 1, 1)))
    image = np.asarray(batch["image"])
    starts, crops = image[:, 0, 4, 4, 1].astype(float), image[:, 0, 4, 4, 2].astype(float)
    assert np.ptp(starts) == 5 and np.ptp(crops) > 2
    assert abs(np.corrcoef(starts, crops)[0, 1]) < 0.2


def test_shuffled_frames_are_the_same_frames(counting: Data) -> None:
    data = dataclasses.replace(counting, video=Video(frames=4, shuffle=True))
    source, rows = open_source(data, "test"), np.arange(5)
    plain = open_source(counting, "test").read(rows)
    shuffled, again = source.read(rows), source.read(rows)
    np.testing.assert_array_equal(np.stack(shuffled["image"]), np.stack(again["image"]))
    frames = np.stack(shuffled["image"])[:, :, 0, 0, 1]
    np.testing.assert_array_equal(np.sort(frames), plain["image"][:, :, 0, 0, 1])
    assert (frames != plain["image"][:, :, 0, 0, 1]).any()
    drawn = [
        tuple(clip[:, 0, 0, 1] - clip[:, 0, 0, 1].min())
        for clip in source.read_train(np.zeros(600, int), 0, np.arange(600))["image"]
    ]
    assert len(set(drawn)) == 24
    with pytest.raises(UserError, match=r"video\.shuffle=True: mnist holds images"):
        open_source(Data(name="mnist", video=Video(shuffle=True)), "train")


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 1, 1)])
def test_views_are_in_order_and_each_once(counting: Data, mesh: tuple[int, ...]) -> None:
    batches = [jax.device_get(b) for b in view_batches(counting, "test", (4, 3), 16, sharding(*mesh))]
    image, mask = (np.concatenate([b[name] for b in batches]) for name in ("image", "mask"))
    assert image.shape == (64, 4, 8, 8, 3) and mask.tolist() == [1.0] * 60 + [0.0] * 4
    views = image[:60].reshape(5, 4, 3, 4, 8, 8, 3)  # [example, time, space, T, H, W, C]
    np.testing.assert_array_equal(
        views[..., 0, 0, 0, 0], np.arange(5)[:, None, None].repeat(4, 1).repeat(3, 2)
    )
    np.testing.assert_array_equal(views[0, :, 0, 0, 0, 0, 1], [begin(p, 9, 4) for p in (0, 1 / 3, 2 / 3, 1)])
    # The long side is 20 of 12, so 13 of 8: its ends and its middle, which is what evaluation crops.
    left, middle, right = (views[0, 0, i, 0, 4, :, 2].astype(int) for i in range(3))
    assert left[0] == 0 and right[-1] == 19 and abs(middle.mean() - 9.5) < 1
    labels = np.concatenate([b["label"] for b in batches])
    assert labels[:60].tolist() == np.repeat(np.arange(5) % 3, 12).tolist()


def test_one_view_is_what_evaluation_sees(counting: Data) -> None:
    for data in (counting, dataclasses.replace(counting, video=Video(frames=4, shuffle=True))):
        ours = [jax.device_get(b) for b in view_batches(data, "test", (1, 1), 8, sharding(8, 1, 1))]
        plain = [jax.device_get(b) for b in eval_batches(data, "test", 8, sharding(8, 1, 1))]
        for one, other in zip(ours, plain, strict=True):
            for name in other:
                np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("change", "views", "said"),
    [
        ({}, (4, 2), r"num_crops=2: must be 1, .*, or 3"),
        ({}, (0, 1), r"num_clips=0: must be at least 1"),
        (
            {"eval_transforms": (), "train_transforms": (), "image_size": None},
            (4, 3),
            r"num_crops=3: needs a crop in",
        ),
        ({"name": "moving_mnist"}, (4, 1), r"num_clips=4: moving_mnist has one clip"),
        ({"name": "mnist"}, (1, 1), r"num_clips=1: mnist holds images"),
    ],
)
def test_views_that_the_data_do_not_have(
    counting: Data, change: dict[str, object], views: tuple[int, int], said: str
) -> None:
    data = dataclasses.replace(counting, **{"image_size": 8, "train_transforms": ("random_crop",), **change})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said) as error:
        open_views(data, "test", *views)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["frames", "stride"])
def test_bad_options(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=0: must be at least 1"):
        Video(**{key: 0})
