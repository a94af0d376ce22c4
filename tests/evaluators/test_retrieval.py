"""Retrieval and zero-shot accuracy against plain forms of both, exact for any batch."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import logsumexp

from scaling import data
from scaling.errors import UserError
from scaling.evaluators import EVALUATORS, Retrieval, ZeroShot
from scaling.models.clip import unit
from scaling.run import build, state
from scaling.training import config
from tests.support.measuring import measured

ROOT = Path(__file__).parents[2]
TINY = {"data.image_size": 8, "model.resolution": 8, "model.patch": 8, "data.batch_size": 16}
TONES = tuple(f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))


@pytest.fixture(scope="module")
def run() -> build.Run:
    return build.build(config.load(str(ROOT / "configs/openmoji_clip.py:ViT-F/8"), TINY))


@pytest.fixture(scope="module")
def weights(run: build.Run) -> dict[str, Any]:
    """Those of a fresh model, with larger towers, so that embeddings differ."""
    return {"params": larger(run), "collections": {}}


def larger(run: build.Run) -> Any:
    return jax.jit(lambda params: jax.tree.map(lambda x: 3.0 * x, params))(state.init(run).params)


@functools.cache
def forward(run: build.Run) -> Any:
    return jax.jit(run.model.apply)


def embedded(run: build.Run, weights: Any, image: np.ndarray, captions: list[str]) -> Any:
    x = jnp.asarray(image, jnp.float32) / 127.5 - 1.0
    text = jnp.asarray(data.tokenizer_of(run.config.data)(captions)["text"])
    image, text, *_ = forward(run)({"params": weights["params"]}, x, text)
    return np.asarray(image), np.asarray(text)


def test_recall_among_all_pairs_of_the_split(run: build.Run, weights: Any) -> None:
    found = measured(Retrieval(batch_size=192), "val", run, weights)  # no divisor of 500
    source: Any = data.open_source(run.config.data, "test")
    captions = [caption for (caption,) in source.source.captions(np.arange(500))]
    image, text = embedded(run, weights, source.read(np.arange(500))["image"], captions)
    scores = image @ text.T
    for way, table in (("i2t", scores), ("t2i", scores.T)):
        place = np.argsort(np.argsort(-table, axis=1), axis=1)[np.arange(500), np.arange(500)]
        for k in (1, 5, 10):
            assert found[f"val_{way}_r{k}"] == pytest.approx(np.mean(place < k), abs=0.0021)  # near ties
    assert 0.0 < found["val_i2t_r10"] < 0.5
    cosine = np.maximum(100 * (image * text).sum(axis=1), 0)
    assert found["val_clip_score"] == pytest.approx(cosine.mean(), rel=1e-4)
    logits = np.exp(float(weights["params"]["logit_scale"])) * image @ text.T  # of all 500 pairs at once
    losses = [logsumexp(logits, axis=axis) - np.diag(logits) for axis in (0, 1)]
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    share = found["val_t2i_r10"]
    assert found["val_t2i_r10_se"] == pytest.approx(np.sqrt(share * (1 - share) / 500))
    again = measured(Retrieval(batch_size=256), "val", run, weights)
    assert again == pytest.approx(found, rel=1e-4, abs=0.0021)


def test_all_captions_of_an_image_count(tmp_path: Path) -> None:
    """As of sets with five captions an image: one of them has to be found, and each has to find the image."""
    rng, words = np.random.default_rng(0), ["a", "cat", "dog", "red", "blue", "house", "tree", "boat"]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / split / f"{i:02}.png")
            lines = [" ".join(rng.choice(words, 4)) for _ in range(1 + i % 3)]
            (tmp_path / split / f"{i:02}.txt").write_text("\n".join(lines))
    own = {"data.name": "pairs", "data.data_dir": str(tmp_path), "data.eval_transforms": ("center_crop(1)",)}
    crops = {"data.train_transforms": ("center_crop(1)",), "data.text.vocab_size": 600}
    run = build.build(config.load(str(ROOT / "configs/openmoji_clip.py:ViT-F/8"), TINY | own | crops))
    params = larger(run)
    found = measured(Retrieval(batch_size=8), "val", run, {"params": params, "collections": {}})
    source: Any = data.open_source(run.config.data, "test")
    several = source.source.captions(np.arange(16))
    owner = np.repeat(np.arange(16), [len(texts) for texts in several])
    pixels = np.stack(source.read(np.arange(16))["image"])
    image, text = embedded(run, {"params": params}, pixels[owner], [t for texts in several for t in texts])
    scores = image[np.searchsorted(owner, np.arange(16))] @ text.T
    for k in (1, 5, 10):
        near = np.argsort(-scores, axis=1)[:, :k]
        first = np.mean([(owner[row] == i).any() for i, row in enumerate(near)])
        assert found[f"val_i2t_r{k}"] == pytest.approx(first, abs=1e-6)
        near = np.argsort(-scores.T, axis=1)[:, :k]
        assert found[f"val_t2i_r{k}"] == pytest.approx((near == owner[:, None]).any(axis=1).mean(), abs=1e-6)
    cosine = np.maximum(100 * (image * text).sum(axis=1), 0)
    assert found["val_clip_score"] == pytest.approx(cosine.mean(), rel=1e-4)


def test_zero_shot_takes_the_nearest_mean_of_templates(run: build.Run, weights: Any) -> None:
    templates = ("{}", "a person with {}", "waving hand {}")
    one = ZeroShot(data={"name": "openmoji_tones"}, classes=TONES, templates=templates, batch_size=96)
    one.check("tones", run)
    found = measured(one, "tones", run, weights)
    source = data.open_source(data.Data(name="openmoji_tones", image_size=8), "test")
    image, label = source.read(np.arange(len(source))).values()
    directions = []
    for tone in TONES:
        captions = [template.replace("{}", tone) for template in templates]
        _, text = embedded(run, weights, image[:3], captions)  # of length 1
        directions.append(unit(jnp.asarray(text.mean(axis=0))))
    towards = np.stack([np.asarray(d) for d in directions])
    images, _ = embedded(run, weights, image, ["a fox"] * len(image))
    assert found["tones_top1"] == pytest.approx(
        np.mean((images @ towards.T).argmax(axis=1) == label), abs=0.007
    )
    assert found["tones_top5"] == 1.0  # of five classes
    plain = measured(ZeroShot(data={"name": "openmoji_tones"}, classes=TONES), "t", run, weights)
    assert set(plain) == {"t_top1", "t_top1_se", "t_top5", "t_top5_se"}
    share = plain["t_top1"]
    assert plain["t_top1_se"] == pytest.approx(np.sqrt(share * (1 - share) / len(source)))


def test_what_cannot_be_measured_is_named(run: build.Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluators.z.classes: names 2, and openmoji_tones has 5; name each class"
    ):
        ZeroShot(data={"name": "openmoji_tones"}, classes=("a", "b")).check("z", run)
    with pytest.raises(
        UserError, match=r"evaluators.z.data: images are \(28, 28, 1\), and the model sees \(8, 8, 3\)"
    ):
        hparam_values = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        ZeroShot(data={"name": "mnist", "image_size": None}, classes=hparam_values).check("z", run)
    with pytest.raises(
        UserError, match=r"evaluators.z.data.nam: no such key; did you mean evaluators.z.data.name\?"
    ):
        ZeroShot(data={"nam": "mnist"}, classes=("a",)).check("z", run)
    with pytest.raises(UserError, match="templates: 'a photo' must have one"):
        ZeroShot(data={"name": "mnist"}, classes=("a",), templates=("a photo",))
    other = build.build(config.load(str(ROOT / "tests/support/tiny_vit.py")))
    with pytest.raises(
        UserError, match=r"evaluators\.r: compares images with texts, which objective classification"
    ):
        Retrieval().check("r", other)
    with pytest.raises(UserError, match=r"evaluators.r.batch_size=12: must be a multiple of .* 8"):
        Retrieval(batch_size=12).check("r", run)
    assert EVALUATORS["retrieval"] is Retrieval


def test_a_tokenizer_of_another_vocabulary_is_named() -> None:
    with pytest.raises(
        UserError, match=r"model.vocabulary=500: the tokenizer of data.text has \d+ tokens; leave"
    ):
        build.build(
            config.load(str(ROOT / "configs/openmoji_clip.py:ViT-F/8"), TINY | {"model.vocabulary": 500})
        )
    run = build.build(config.load(str(ROOT / "configs/openmoji_clip.py:ViT-F/8"), TINY))
    assert run.info.text is not None and run.model.vocabulary == run.info.text.vocabulary
    assert run.model.context == 16
