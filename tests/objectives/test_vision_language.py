"""Matching, hidden words, hidden patches and retrieval, against loops over pairs on a small model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.objectives import make
from scaling.objectives.base import Extras, Loss, scaled
from scaling.objectives.masking import mean_colours, own_draw, picked
from scaling.objectives.vision_language import VisionLanguage
from tests.support.checks import KEY, check_eight_devices, check_masked, images
from tests.support.toys import Reader

MODEL = Reader()
APPLY = jax.jit(lambda variables, image, *texts: MODEL.apply(variables, scaled(image), *texts))
MASK = 29
ALL: dict[str, Any] = dict(itm=1.0, mlm=0.5, mpp=0.25, retrieval=2.0, captions=3, mask_token=MASK)


def pairs(size: int, wrong: int = 0) -> dict[str, jax.Array]:
    """Images [size, 4, 4, 3] with captions of one to five words, some of two tokens."""
    rng = np.random.default_rng(0)
    text, word = np.zeros((size, 8), np.int32), np.full((size, 8), -1, np.int32)
    for row in range(size):
        count = int(rng.integers(1, 6))
        ids = np.repeat(np.arange(count), rng.integers(1, 3, count))[:6]
        text[row, 0], text[row, len(ids) + 1] = 1, 2  # [CLS] and [SEP]
        text[row, 1 : len(ids) + 1] = rng.integers(3, 28, len(ids))
        word[row, 1 : len(ids) + 1] = ids
    batch = {"image": images(size, channels=3), "text": text, "text_mask": text > 0, "text_word": word}
    if wrong:
        other = (np.arange(size)[:, None] + 1 + np.arange(wrong)[None]) % size
        batch |= {"wrong_text": text[other], "wrong_mask": (text > 0)[other]}
    return {name: jnp.asarray(x) for name, x in batch.items()}


def params(scale: float = 0.3) -> Any:
    """Of every head, and not so small that all results are alike."""
    image, text = jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 8), jnp.int32)
    made = jax.jit(MODEL.init)(jax.random.key(0), image, text, text == 0)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(x + scale * rng.standard_normal(x.shape)), jax.device_get(made))


@pytest.fixture(scope="module")
def weights() -> Any:
    return params()


def see(weights: Any, batch: dict[str, Any], **changed: Any) -> dict[str, np.ndarray]:
    given = {**batch, **changed}
    out: Any = APPLY(
        {"params": weights},
        given["image"],
        given["text"],
        given["text_mask"],
        given.get("hidden"),
    )
    return {k: np.asarray(v) for k, v in out.items()}


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def loss(weights: Any, batch: dict[str, Any], train: bool, key: jax.Array = KEY, **options: Any) -> Loss:
    return _loss(train, **options)(weights, batch, key)


@functools.cache
def _loss(train: bool, **options: Any) -> Any:
    task = VisionLanguage(MODEL, **{**ALL, **options})
    return jax.jit(lambda w, b, k: task.loss(w, Extras(), b, k, train))


def test_evaluation_against_loops(weights: Any) -> None:
    """Each task's loss and accuracy, pair by pair."""
    size = 7
    batch = pairs(size, wrong=3)
    found = loss(weights, batch, train=False)

    @jax.jit
    def drawn(batch: dict[str, jax.Array]) -> Any:
        patches = picked(own_draw(batch["text"], "patches", 4), jnp.full(size, 4), 0.15)
        words, colours = (
            VisionLanguage(MODEL, **ALL).hidden_words(batch),
            mean_colours(scaled(batch["image"]), 2),
        )
        return words, patches, colours

    hide, patches, colours = jax.device_get(drawn(batch))
    text = np.asarray(batch["text"])
    per: dict[str, list[float]] = {name: [] for name in ("itm", "mlm", "mpp", "retrieval")}
    hits: dict[str, list[float]] = {name: [] for name in ("itm", "mlm", "retrieval")}
    for i in range(size):
        one = {name: np.asarray(x)[i : i + 1] for name, x in batch.items()}
        plain = see(weights, one)
        wrong = [
            see(weights, one, text=one["wrong_text"][:, k], text_mask=one["wrong_mask"][:, k])
            for k in range(3)
        ]
        per["itm"].append(-(log_softmax(plain["itm"])[0, 1] + log_softmax(wrong[0]["itm"])[0, 0]) / 2)
        hits["itm"] += [plain["itm"][0].argmax() == 1, wrong[0]["itm"][0].argmax() == 0]
        words = see(weights, one, text=np.where(hide[i], MASK, text[i])[None])["mlm"][0]
        named = [
            (log_softmax(words)[p, text[i, p]], words[p].argmax() == text[i, p])
            for p in np.flatnonzero(hide[i])
        ]
        per["mlm"].append(-np.mean([cost for cost, _ in named]))
        hits["mlm"] += [hit for _, hit in named]
        seen = log_softmax(see(weights, one, hidden=patches[i : i + 1])["mpp"][0])
        (p,) = np.flatnonzero(patches[i])
        per["mpp"].append(-np.mean([seen[p, c, colours[i, p, c]] for c in range(3)]))
        scores = np.array([out["retrieval"][0, 0] for out in (plain, *wrong)])
        per["retrieval"].append(-log_softmax(scores)[0])
        hits["retrieval"].append(scores[0] > scores[1:].max())
    expected = {name: np.mean(x) for name, x in per.items()}
    expected |= {"itm_accuracy": np.mean(hits["itm"]), "mlm_accuracy": np.mean(hits["mlm"])}
    expected |= {"retrieval_top1": np.mean(hits["retrieval"])}
    expected["loss"] = sum(ALL[name] * np.mean(x) for name, x in per.items())
    means = {name: float(found.sums[name] / found.counts[name]) for name in found.sums}
    assert means == pytest.approx(expected, rel=2e-4)
    assert float(found.value) == pytest.approx(expected["loss"], rel=2e-4)
    assert float(found.counts["mlm_accuracy"]) == hide.sum() and float(found.counts["itm_accuracy"]) == size
    assert 0 < means["itm_accuracy"] < 1


def test_training_matches_half_of_the_pairs_with_another_caption(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the model is shown: its loss is that of those pairs and labels."""
    batch, shown = pairs(16), []
    task = VisionLanguage(MODEL, **{**ALL, "mlm": 0.0, "mpp": 0.0, "retrieval": 0.0})
    original = VisionLanguage._bind_model

    def spy(self: Any, *args: Any) -> Any:
        inner = original(self, *args)

        def record(image: Any, text: Any, mask: Any, hidden: Any = None) -> Any:
            shown.append((text, mask))
            return inner(image, text, mask, hidden)

        return record

    monkeypatch.setattr(VisionLanguage, "_bind_model", spy)

    def seen_by(task: VisionLanguage, key: jax.Array) -> Any:
        return jax.jit(lambda key: (task.loss(weights, Extras(), batch, key, True), shown.pop()))(key)

    found, (text, mask) = jax.device_get(seen_by(task, KEY))
    own = np.asarray((text == batch["text"]).all(axis=1))
    np.testing.assert_array_equal(own, np.arange(16) % 2 == 0)
    assert {tuple(row) for row in np.asarray(text).tolist()} <= {tuple(r) for r in batch["text"].tolist()}
    np.testing.assert_array_equal(mask, text > 0)  # a caption brings its own mask
    logits = log_softmax(see(weights, batch, text=text, text_mask=mask)["itm"])
    assert float(found.value) == pytest.approx(-np.mean(logits[np.arange(16), own.astype(int)]), rel=1e-4)
    other, _ = seen_by(task, jax.random.key(8))
    assert float(other.value) != float(found.value)
    hard = dataclasses.replace(task, hardness=50.0)
    assert float(seen_by(hard, KEY)[0].value) != float(found.value)
    assert not shown


def test_equal_captions_are_no_wrong_ones(weights: Any) -> None:
    batch = pairs(16)
    same = {k: jnp.tile(v[:1], (16, 1)) if k != "image" else v for k, v in batch.items()}
    found = loss(weights, same, train=True, mlm=0.0, mpp=0.0)
    logits = log_softmax(see(weights, same)["itm"])
    assert float(found.sums["itm"] / 16) == pytest.approx(-logits[:, 1].mean(), rel=1e-4)
    assert float(found.sums["retrieval"]) == 0.0  # nothing but the right one to choose from


def test_training_words_are_hidden_by_the_key(weights: Any) -> None:
    only = dict(itm=0.0, mpp=0.0, retrieval=0.0)
    batch = pairs(16)
    a, b = (loss(weights, batch, train=True, key=jax.random.key(k), **only) for k in (0, 1))
    assert a.value != b.value
    assert 16 <= float(a.counts["mlm_accuracy"]) <= 32  # a word of each caption, of a token or two
    assert loss(weights, batch, True, key=jax.random.key(0), **only).value == a.value


def test_evaluation_does_not_depend_on_the_batch(weights: Any) -> None:
    """Example by example, whatever the key and the neighbours."""
    batch = pairs(10, wrong=3)
    whole = loss(weights, batch, train=False)
    sums: dict[str, float] = dict.fromkeys(whole.sums, 0.0)
    for rows in (np.arange(5, 10), np.arange(0, 5)):
        part = loss(
            weights, {k: np.asarray(v)[rows] for k, v in batch.items()}, train=False, key=jax.random.key(99)
        )
        sums = {k: sums[k] + float(v) for k, v in part.sums.items()}
    assert sums == pytest.approx({k: float(v) for k, v in whole.sums.items()}, rel=1e-5)


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"hardness": 5.0}])
def test_eight_devices(options: dict[str, float]) -> None:
    check_eight_devices(VisionLanguage(MODEL, **{**ALL, **options}), pairs(16))


def test_masked_examples_weigh_nothing() -> None:
    task = VisionLanguage(MODEL, **{**ALL, "mlm": 0.0})
    names = {"loss", "itm", "itm_accuracy", "mpp", "retrieval", "retrieval_top1"}
    check_masked(task, pairs(16, wrong=3), names)


def test_score_is_the_retrieval_heads_else_the_odds_of_matching(weights: Any) -> None:
    batch = pairs(3)
    out = see(weights, batch)

    def score(task: VisionLanguage) -> jax.Array:
        return jax.jit(lambda w, b: task.score(w, Extras(), b))(weights, batch)

    task = VisionLanguage(MODEL, **ALL)
    np.testing.assert_allclose(score(task), out["retrieval"][:, 0], atol=1e-5)
    fewer = VisionLanguage(MODEL.clone(tasks=("itm",)), mlm=0.0)
    odds = out["itm"][:, 1] - out["itm"][:, 0]
    np.testing.assert_allclose(score(fewer), odds, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"itm": -1.0}, r"itm=-1\.0: must be at least 0"),
        ({"itm": 0.0, "mlm": 0.0}, r"itm=0\.0: one of itm, mlm, mpp, retrieval must have a weight"),
        ({"share": 1.0}, r"share=1\.0: must be between"),
        ({"captions": 0}, r"captions=0: must be at least 1"),
        ({"hardness": -1.0}, r"hardness=-1\.0"),
        ({"mask_token": None}, r"mlm=1\.0: the tokenizer has no \[MASK\]"),
        ({"model": MODEL.clone(tasks=("mlm",))}, r"itm=1\.0: model\.tasks=\('mlm',\) must have itm"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make("vision_language", **{"model": MODEL, "mask_token": MASK, **options})


def test_what_is_needed_is_said(weights: Any) -> None:
    task = VisionLanguage(MODEL, **ALL)
    with pytest.raises(UserError, match=r"vision_language: needs images with captions"):
        task.init(KEY, {"image": jnp.zeros((1, 4, 4, 3))})
    with pytest.raises(UserError, match=r"needs wrong captions"):
        task.loss(weights, Extras(), pairs(2), KEY, False)
