"""Accuracy of views: averaged over the clips of a video, every video once, and factor by factor."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling import data, evaluators
from scaling.errors import UserError
from scaling.evaluators.views import Views, accuracies
from scaling.run import build, state
from scaling.training import config
from tests.support.measuring import measured

ROOT = Path(__file__).parents[2]
VIDEO = str(ROOT / "configs/mnist_vivit.py:joint")
SMALL = ["model.variant=A/14x2", "model.depth=1", "data.batch_size=16"]


def test_accuracy_of_a_product_of_classes() -> None:
    """Label = item * 2 + motion, of 3 items: the marginal may be right where the joint is not."""
    p = np.array(
        [
            [0.1, 0.3, 0.25, 0.25, 0.1, 0.0],  # joint 1; items 0.4, 0.5, 0.1; motions 0.45, 0.55
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    found = accuracies(p, np.array([3, 5, 1]), {"item": 3, "motion": 2})
    assert found == {"top1": pytest.approx(1 / 3), "top5": 1.0, "item": 1.0, "motion": pytest.approx(2 / 3)}
    assert set(accuracies(p, np.array([3, 5, 1]))) == {"top1", "top5"}


def weights_of(run: build.Run) -> dict[str, Any]:
    """Random ones, the head's too: it starts at 0."""
    current = state.init(run)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jax.device_put(rng.standard_normal(a.shape).astype(np.float32), a.sharding), current.params
    )
    return {"params": params, "collections": current.collections}


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("devices", [1, 8])
def test_views_are_averaged_by_example(devices: int, average: str, tmp_path: Path) -> None:
    overrides = {
        "data.name": "counting", "data.image_size": 8, "data.train_transforms": ("random_crop",),
        "data.eval_transforms": ("center_crop(1)",), "data.video.frames": 4, "data.batch_size": 8,
        "model.variant": "A/4x2", "model.depth": 1, "evaluators.val.num_clips": 2,
        "evaluators.val.num_crops": 3, "evaluators.val.batch_size": 8, "evaluators.val.average": average,
    }  # fmt: skip
    run = build.build(config.load(VIDEO, overrides), jax.devices()[:devices])
    weights, views = weights_of(run), evaluators.make(run.config.evaluators)["val"]
    views.check("val", run)
    found = measured(views, "val", run, weights)
    source = data.open_views(run.config.data, "test", 2, 3)
    columns = source.read(np.arange(len(source)))
    x = np.stack(columns["image"]).astype(np.float32) / 127.5 - 1
    logits = np.asarray(run.model.apply({"params": weights["params"]}, x))
    seen = np.asarray(jax.nn.softmax(logits)) if average == "probabilities" else logits
    mean = seen.reshape(5, 6, 3).mean(axis=1)  # 5 videos, 6 views, 3 classes
    hits = mean.argmax(axis=1) == np.arange(5) % 3
    error = float(np.sqrt(hits.mean() * (1 - hits.mean()) / 5))
    expected = {"val_top1": hits.mean(), "val_top1_se": error, "val_top5": 1.0, "val_top5_se": 0.0}
    assert found == pytest.approx(expected)


def test_moving_digits_are_scored_by_item_and_motion(tmp_path: Path) -> None:
    run = build.build(config.load(VIDEO, SMALL))
    found = measured(  # 1,000 clips: the last batch is padded
        Views(num_clips=1, num_crops=1, batch_size=96), "val", run, weights_of(run)
    )
    shares = {name: value for name, value in found.items() if not name.endswith("_se")}
    assert set(shares) == {"val_top1", "val_top5", "val_item", "val_motion"}
    assert all(round(1000 * value, 6) % 1 == 0 for value in shares.values())  # thousandths: each clip once
    for name, share in shares.items():
        assert found[f"{name}_se"] == pytest.approx(np.sqrt(share * (1 - share) / 1000))
    assert found["val_top1"] <= min(found["val_item"], found["val_motion"]) + 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_clips": 2, "num_crops": 1}, r"evaluators\.val\.num_clips=2: moving_mnist has one clip"),
        ({"num_clips": 1, "num_crops": 3}, r"evaluators\.val\.num_crops=3: needs a crop"),
        (
            {"num_clips": 1, "num_crops": 1, "batch_size": 12},
            r"evaluators\.val\.batch_size=12: must be a multiple",
        ),
    ],
)
def test_what_views_cannot_do(options: dict[str, int], said: str) -> None:
    run = build.build(config.load(VIDEO, SMALL))
    with pytest.raises(UserError, match=said) as error:
        Views(**options).check("val", run)
    assert "\n" not in str(error.value)


def test_views_are_of_classifiers() -> None:
    run = build.build(config.load(str(ROOT / "tests/support/tiny_dit.py")))
    with pytest.raises(UserError, match=r"evaluators\.val: averages classes, which objective diffusion"):
        Views().check("val", run)


def test_images_and_videos_are_not_mistaken_for_one_another() -> None:
    with pytest.raises(UserError, match=r"model\.name='vivit': takes videos, and mnist holds images"):
        build.build(config.load(VIDEO, [*SMALL, "data.name=mnist"]))
    with pytest.raises(UserError, match=r"model\.name='vit': takes images, and moving_mnist holds videos"):
        build.build(config.load(str(ROOT / "configs/mnist_vit.py"), ["data.name=moving_mnist"]))
