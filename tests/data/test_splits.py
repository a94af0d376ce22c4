"""The split that an evaluator reads is looked at before training, not hours later."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from scaling.data import Data
from scaling.errors import UserError
from scaling.evaluators.base import Evaluator
from scaling.evaluators.linear import Linear
from scaling.evaluators.metrics import Metrics
from scaling.run import build
from scaling.run import config as run_config
from scaling.run.options import Config
from scaling.training import config, loop
from tests.support.tfds_mock import mocked

TINY = str(Path(__file__).parents[1] / "support/tiny_vit.py")
SAID = r"evaluators\.val\.split='test': images of birds are \(4, 8, 3\), and the model sees \(8, 8, 3\); make"


@pytest.fixture
def birds(tmp_path: Path) -> Data:
    """16 images of 8 x 8 pixels to train on, and others to test."""
    rng, arrays = np.random.default_rng(0), {}
    for split, height in (("train", 8), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (16, height, 8, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(16) % 4
    np.savez(tmp_path / "birds.npz", **arrays)
    return Data(name="npz", data_dir=str(tmp_path / "birds.npz"), batch_size=16)


def config_of(data: Data) -> Config:
    raw = config.load_dict(TINY)
    raw["data"] = dataclasses.asdict(data)
    return run_config.from_dict(raw)


def test_a_run_does_not_begin_with_test_images_of_another_size(birds: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=SAID) as error:
        loop.train(config_of(birds), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_crop_makes_them_one_size(birds: Data, tmp_path: Path) -> None:
    crop = ("center_crop",)
    cropped = dataclasses.replace(birds, image_size=8, train_transforms=crop, eval_transforms=crop)
    assert "val_top1" in loop.train(config_of(cropped), tmp_path / "run")


@pytest.mark.parametrize(
    ("evaluator", "key"),
    [
        (Metrics(), "split='test'"),
        (Linear(), "split='test'"),
        (Linear(fit_split="test", split="train"), "fit_split='test'"),
        (Linear(inputs="features"), "split='test'"),
    ],
    ids=str,
)
def test_every_split_is_looked_at(evaluator: Evaluator, key: str, birds: Data) -> None:
    run = build.build(config_of(birds))
    with pytest.raises(UserError, match=rf"evaluators\.val\.{key}: images of birds are \(4, 8, 3\)"):
        evaluator.check("val", run)


def test_splits_that_fit_pass(birds: Data) -> None:
    run = build.build(config_of(birds))
    for evaluator in (Metrics(split="train"), Linear(split="train")):
        evaluator.check("val", run)


def test_a_split_that_is_not_there_is_named(birds: Data) -> None:
    run = build.build(config_of(birds))
    said = r"evaluators\.val\.split='val': split 'val': .*birds\.npz has test, train"
    with pytest.raises(UserError, match=said):
        Metrics(split="val").check("val", run)


def test_images_of_an_evaluators_own_are_looked_at(birds: Data, tmp_path: Path) -> None:
    even = {f"{split}_images": np.zeros((16, 8, 8, 3), np.uint8) for split in ("train", "test")}
    np.savez(
        tmp_path / "even.npz", **even, **dict.fromkeys(("train_labels", "test_labels"), np.arange(16) % 4)
    )
    run = build.build(config_of(dataclasses.replace(birds, data_dir=str(tmp_path / "even.npz"))))
    Linear().check("val", run)
    other: dict[str, Any] = {"name": "npz", "data_dir": birds.data_dir}
    with pytest.raises(UserError, match=SAID):
        Linear(data=other).check("val", run)


def test_a_split_without_labels_is_named_before_training() -> None:
    data = Data(name="tfds", builder="cifar10", batch_size=16)
    with tfds.testing.mock_data(as_data_source_fn=mocked):
        run = build.build(config_of(data))
        Metrics(split="validation").check("val", run)
        said = r"evaluators\.val\.split='test': cifar10: example 0 has label -1, which stands for none"
        with pytest.raises(UserError, match=said):
            Metrics(split="test").check("val", run)
