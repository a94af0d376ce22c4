"""Right and wrong captions of a split: the same for every batch size, and counted once."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling import data
from scaling.errors import UserError
from scaling.evaluators.base import Context
from scaling.evaluators.captions import captions_of, most_frequent
from scaling.evaluators.matching import Matching, wrong_captions
from scaling.evaluators.metrics import Metrics
from scaling.evaluators.pair_scoring import make_pair_scores
from scaling.evaluators.retrieval import Retrieval
from scaling.parallel import sharding
from scaling.run import build, state
from scaling.run.cost import run_cost
from scaling.run.helpers import RunHelpers
from scaling.training import config
from tests.support.measuring import measured

TINY = str(Path(__file__).parents[1] / "support/tiny_vilt.py")
TOKENS = ("text", "text_mask")


@pytest.fixture(scope="module")
def run() -> build.Run:
    return build.build(config.load(TINY))


@pytest.fixture(scope="module")
def weights(run: build.Run) -> Any:
    """Not so small that every score is the same."""
    fresh = state.eval_weights(state.init(run))
    leaves, tree = jax.tree.flatten(fresh["params"])
    rng = np.random.default_rng(0)
    noisy = [np.asarray(x + 0.3 * rng.standard_normal(x.shape), np.float32) for x in map(np.asarray, leaves)]
    shardings = jax.tree.map(lambda x: x.sharding, fresh["params"])
    return {**fresh, "params": jax.device_put(jax.tree.unflatten(tree, noisy), shardings)}


@functools.cache
def apply(run: build.Run) -> Any:
    return jax.jit(run.model.apply)


def forward(run: build.Run, weights: Any, images: np.ndarray, tokens: dict[str, np.ndarray]) -> Any:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    out = apply(run)({"params": weights["params"]}, x, *(tokens[name] for name in TOKENS))
    return {name: np.asarray(value) for name, value in out.items()}


def test_wrong_captions_are_others_and_each_as_often() -> None:
    text = np.stack([np.arange(50) // 2, np.arange(50) // 2], axis=1)  # each caption twice
    found = wrong_captions(text, 3)
    assert found.shape == (50, 3)
    assert all((text[others] != text[row]).any(axis=1).all() for row, others in enumerate(found))
    assert all(len(set(others.tolist())) == 3 for others in found)
    assert np.bincount(found[:, 0], minlength=50).max() <= 2
    np.testing.assert_array_equal(wrong_captions(text, 3), found)
    assert wrong_captions(text, 48).shape == (50, 48)
    with pytest.raises(UserError, match=r"needs 49 wrong captions of an image, and has 48"):
        wrong_captions(text, 49)


def test_metrics_are_those_of_the_split_by_hand_and_of_any_batch_size(run: build.Run, weights: Any) -> None:
    found = {}
    for size in (512, 104):  # with padding, and with another share of it
        evaluator = Matching(batch_size=size)
        evaluator.check("val", run)
        found[size] = measured(evaluator, "val", run, weights)
    assert found[104] == pytest.approx(found[512], rel=1e-5)

    source: Any = data.open_source(run.config.data, "test")
    images = source.read(np.arange(500))["image"]
    tokens = captions_of(run.config.data, "test").first()
    wrong = wrong_captions(tokens["text"], 3)[:, 0]
    right = forward(run, weights, images, tokens)["itm"].argmax(axis=1) == 1
    other = {name: tokens[name][wrong] for name in TOKENS}
    left = forward(run, weights, images, other)["itm"].argmax(axis=1) == 0
    assert found[512]["val_itm_accuracy"] == pytest.approx((right.mean() + left.mean()) / 2, abs=1e-6)

    hidden = np.asarray(run.objective.hidden_words({k: jnp.asarray(v) for k, v in tokens.items()}))  # type: ignore[attr-defined]
    train: Any = data.open_source(run.config.data, "train")
    words = source.tokenizer([texts[0] for texts in train.source.captions(np.arange(len(train)))])
    common = np.bincount(words["text"][words["text_word"] >= 0]).argmax()
    assert most_frequent(run.config.data) == common
    assert found[512]["val_mlm_unigram"] == pytest.approx((tokens["text"][hidden] == common).mean(), abs=1e-9)
    seen = {**tokens, "text": np.where(hidden, run.info.text.mask, tokens["text"])}  # type: ignore[union-attr]
    named = forward(run, weights, images, seen)["mlm"].argmax(axis=-1)
    accuracy = (named == tokens["text"])[hidden].mean()
    assert found[512]["val_mlm_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_every_pair_is_scored_and_the_right_one_ranked(run: build.Run, weights: Any) -> None:
    context = Context("val", run, Path(), RunHelpers(run))
    scores = make_pair_scores(context, "test", 16, 21)({"collections": {}, **weights})
    assert scores.shape == (21, 21)
    source = data.open_source(run.config.data, "test")
    images = source.read(np.arange(21))["image"]
    tokens = {name: column[:21] for name, column in captions_of(run.config.data, "test").first().items()}
    for caption in (0, 7, 20):
        same = {name: np.repeat(column[caption : caption + 1], 21, axis=0) for name, column in tokens.items()}
        expected = forward(run, weights, images, same)["retrieval"][:, 0]
        np.testing.assert_allclose(scores[:, caption], expected, atol=1e-4)
    evaluator = Retrieval(batch_size=16, pairs=21)
    evaluator.check("pairs", run)
    found = measured(evaluator, "pairs", run, weights)
    own = np.diag(scores)
    for way, rows in (("i2t", scores), ("t2i", scores.T)):
        before = (rows > own[:, None]).sum(axis=1)
        for k in (1, 5, 10):
            assert found[f"pairs_{way}_r{k}"] == pytest.approx((before < k).mean(), abs=1e-6)
    assert len(found) == 12 and len([name for name in found if name.endswith("_se")]) == 6


def test_what_does_not_fit_is_said_before_training(run: build.Run) -> None:
    with pytest.raises(UserError, match=r"evaluators\.val\.name='metrics': must be matching"):
        Metrics().check("val", run)
    with pytest.raises(UserError, match=r"evaluators\.val\.batch_size=12"):
        Matching(batch_size=12).check("val", run)
    with pytest.raises(UserError, match=r"pairs=0: must be at least 1"):
        Retrieval(pairs=0)
    words = build.build(config.load(TINY, {"objective.itm": 0.0, "objective.retrieval": 0.0}))
    with pytest.raises(UserError, match=r"evaluators\.pairs: scores pairs"):
        Retrieval().check("pairs", words)
    with pytest.raises(UserError, match=r"objective\.mlm=1\.0: the tokenizer has no \[MASK\]"):
        build.build(config.load(TINY, {"data.text.name": "clip"}))
    digits = build.build(config.load(str(Path(TINY).with_name("tiny_vit.py"))))
    with pytest.raises(UserError, match=r"evaluators\.val: matches pairs, which objective classification"):
        Matching().check("val", digits)


def test_a_pass_is_what_an_example_costs(run: build.Run) -> None:
    """Whatever the number of tasks, each of which takes one."""
    one = build.build(config.load(TINY, {"objective.mlm": 0.0, "objective.retrieval": 0.0}))
    both, itm = run_cost(run), run_cost(one)
    assert both["gmacs"] == itm["gmacs"]
    assert both["train_flops_per_step"] > 2 * itm["train_flops_per_step"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("about", "classes", "images"),
    [pytest.param("answers", 7, (), marks=pytest.mark.slow), ("both", 2, (2,))],
)
def test_questions_about_drawings_take_a_step(about: str, classes: int, images: tuple[int, ...]) -> None:
    """The config builds for both heads, its shapes are the data's, and the loss has a gradient everywhere."""
    overrides = {"data.image_size": 8, "data.batch_size": 8, "model.depth": 1, "data.text.vocab_size": 600}
    path = Path(TINY).parents[2] / f"configs/openmoji_questions.py:{about}"
    run = build.build(config.load(str(path), overrides))
    assert (run.info.num_classes, run.info.image_shape) == (classes, (*images, 8, 8, 3))
    place = sharding.batch_sharding(run.mesh, 8, "batch_size")
    batch = next(data.train_batches(run.config.data, 0, 0, place))
    fresh = state.init(run)
    before = jax.tree.map(np.asarray, fresh.params)
    after, metrics = state.make_step(run)(fresh, batch, state.traced_hparams(run))
    # Near chance: eight examples, and logits of a fresh head that are a few tenths apart.
    assert float(metrics["loss"]) == pytest.approx(np.log(run.model.num_classes), abs=0.1)
    assert float(metrics["grad_norm"]) > 0 and int(after.step) == 1
    assert jax.tree.structure(after.params) == jax.tree.structure(before)
