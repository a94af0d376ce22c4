"""What is not finite scores nothing: every evaluator refuses it, by its name, and every metric."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.data import tokenizer_of
from scaling.errors import NotFinite, UserError
from scaling.evaluators import (
    EVALUATORS,
    DenoisingLoss,
    Frechet,
    Grid,
    Linear,
    Matching,
    Metrics,
    Retrieval,
    Views,
    ZeroShot,
)
from scaling.evaluators.classifier_features import ClassifierFeatures
from scaling.evaluators.features import reference_stats
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.retrieval import places, recalls
from scaling.models import clip, dit, t5, vilt
from scaling.run import build, restore, state
from scaling.run.checkpoint import Checkpoints
from scaling.sampling import Sampling
from scaling.training import config, evaluate, loop
from scaling.training.import_weights import create_run_from_weights
from tests.support.measuring import prepared
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
EULER = Sampling(integrator="euler", steps=2)
CLIP = (
    "configs/openmoji_clip.py:ViT-F/8",
    {"model.depth": 1, "model.text_depth": 1, "data.image_size": 8, "data.text.vocab_size": 600},
)
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {  # kind -> config, overrides, an evaluator of them
    "metrics": ("tests/support/tiny_vit.py", {}, Metrics(batch_size=128)),
    "linear": ("tests/support/tiny_vit.py", {}, Linear(inputs="features", batch_size=512)),
    "denoising_loss": ("tests/support/tiny_dit.py", {}, DenoisingLoss(batch_size=64, examples=64)),
    "grid": ("tests/support/tiny_dit.py", {}, Grid(samples=8, batch_size=8, sampling=EULER)),
    "frechet": (
        "tests/support/tiny_dit.py",
        {},
        Frechet(classifier="{folder}", classifier_config="", samples=160, batch_size=80, sampling=EULER),
    ),
    "retrieval": (*CLIP, Retrieval()),
    "zero_shot": (
        *CLIP,
        ZeroShot(data={"name": "openmoji_tones"}, classes=("light", "a", "b", "c", "dark")),
    ),
    "matching": ("tests/support/tiny_vilt.py", {}, Matching(batch_size=512)),
    "views": (
        "configs/mnist_vivit.py:joint",
        {"model.depth": 1, "model.width": 16, "model.heads": 2, "data.name": "moving_mnist"},
        Views(num_clips=1, num_crops=1, batch_size=256),
    ),
}


def spoilt(run: build.Run) -> dict[str, Any]:
    """Weights to evaluate with, one number of which is not finite."""
    weights = state.eval_weights(state.init(run))

    def spoil(x: jax.Array) -> jax.Array:
        array = np.array(x)
        if x.ndim > 1:
            array[(0,) * x.ndim] = np.nan
        return jax.device_put(array, x.sharding)

    return {**weights, "params": jax.tree.map(spoil, weights["params"])}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "classifier"
    create_run_from_weights(
        build.build(config.load(str(ROOT / "tests/support/tiny_vit.py"))), {"params": {}}, folder, "a test"
    )
    return folder


def test_there_is_a_case_for_every_evaluator() -> None:
    assert CASES.keys() == EVALUATORS.keys()
    assert all(isinstance(case[2], EVALUATORS[kind]) for kind, case in CASES.items())


LONG = {"linear", "matching", "views", "zero_shot"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LONG)) for kind in CASES]
)
def test_an_evaluator_refuses_what_is_not_finite_by_name(kind: str, classifier: Path, tmp_path: Path) -> None:
    path, overrides, evaluator = CASES[kind]
    if kind == "frechet":
        evaluator = Frechet(**{**vars(evaluator), "classifier": str(classifier)})
    run = build.build(config.load(str(ROOT / path), overrides))
    evaluator.check("mine", run)
    measure = prepared(evaluator, "mine", run, tmp_path)
    values = measure(state.eval_weights(state.init(run)), 3)
    assert sorted(values) == sorted(evaluator.metrics("mine", run)) and (values or kind == "grid")
    message = r"^evaluators\.mine: step 3: .*(not finite|=nan).*; look at the weights and the images$"
    with pytest.raises(NotFinite, match=message) as e:
        measure(spoilt(run), 3)
    assert "\n" not in str(e.value)


def test_the_verbs_refuse_it_too(tiny: dict[str, str], tmp_path: Path) -> None:
    """`scaling evaluate` and `scaling sample` of a run whose weights were spoilt end with an error."""
    for family in ("vit", "dit"):
        run = build.build(config.load(tiny[family], {"optimizer.ema_decays": ()}))
        fresh = state.init(run)
        bad = state.with_weights(fresh, spoilt(run)["params"], {})
        folder = tmp_path / family
        create_run_from_weights(run, {"params": {}}, folder, "a test")
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(1, bad, {"step": 1})
    with pytest.raises(NotFinite, match=r"evaluators\.val: step 1: val_loss=nan"):
        evaluate.evaluate(tmp_path / "vit")
    with pytest.raises(NotFinite, match="samples: 8 of 8 are not finite, from number 0 on"):
        evaluate.sample(tmp_path / "dit", tmp_path / "grid.png", None, 8, 8, {})
    assert not (tmp_path / "grid.png").exists()
    with pytest.raises(NotFinite, match=r"features: \d+ of \d+ rows are not finite"):
        reference_stats(ClassifierFeatures(tmp_path / "vit"), "test", config.load(tiny["vit"]).data)
    assert not list((tmp_path / "vit").glob("features_*"))


def test_training_stops_at_an_evaluation_that_is_not_finite(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.load(tiny["vit"], {"evaluators.val.every": "2 steps"})
    bad = spoilt(build.build(cfg))
    monkeypatch.setattr(state, "eval_weights", lambda current: bad)
    with pytest.raises(UserError, match=r"evaluators\.val: step 2: val_loss=nan"):
        loop.train(cfg, tmp_path)
    assert not [e for e in loop.read_events(tmp_path) if e["event"] == "evaluate"]


def test_a_hit_of_what_is_not_finite_is_none() -> None:
    """Sorting would put NaN first, at class 0; and infinity, whatever the class."""
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        logits = jnp.zeros((3, 5)).at[1, 2].set(bad)
        hits = np.asarray(topk_hits(logits, jnp.zeros(3, jnp.int32), 1))
        assert hits[[0, 2]].tolist() == [1.0, 1.0] and np.isnan(hits[1])


def test_no_query_is_first_by_what_is_not_finite() -> None:
    own = jnp.eye(4, dtype=bool)
    for bad in (jnp.nan, jnp.inf):
        scores = jnp.eye(4).at[2, 1].set(bad)
        found = np.asarray(places(scores, own))
        assert found.tolist() == [0, 0, -1, 0]
        with pytest.raises(NotFinite, match="recall: 1 of 4 queries have scores that are not finite"):
            recalls(found)


# Ids outside of a table


TEXT = jnp.zeros((1, 8), jnp.int32)
TABLES: dict[str, tuple[Any, dict[str, jax.Array], str, int]] = {  # model, inputs, which are ids, rows
    "dit": (
        dit.make("A/14", depth=1),
        {"x": jnp.zeros((1, 28, 28, 1)), "t": jnp.zeros(1), "y": jnp.zeros(1, jnp.int32)},
        "y",
        11,
    ),
    "clip": (
        clip.make("ViT-F/16", depth=1, text_depth=1, context=8),
        {"x": jnp.zeros((1, 32, 32, 3)), "text": TEXT},
        "text",
        1024,
    ),
    "t5": (
        t5.T5Encoder(width=8, depth=1, heads=2, head_width=4, mlp_width=8, vocabulary=20),
        {"text": TEXT, "mask": jnp.ones((1, 8), bool)},
        "text",
        20,
    ),
    "vilt": (
        vilt.make("A/8", depth=1, length=8),
        {"x": jnp.zeros((1, 32, 32, 3)), "text": TEXT, "mask": jnp.ones((1, 8), bool)},
        "text",
        vilt.make("A/8").vocabulary,
    ),
}


@pytest.mark.parametrize("family", TABLES)
def test_an_id_outside_of_a_table_is_an_error_or_nothing_finite(family: str) -> None:
    model, inputs, name, rows = TABLES[family]
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)

    rng = np.random.default_rng(0)

    def random(x: jax.Array) -> jax.Array:  # what starts at 0 would hide what comes before it
        return jnp.asarray(np.asarray(x) + 0.1 * rng.standard_normal(x.shape), x.dtype)

    variables, apply = jax.tree.map(random, variables), jax.jit(model.apply)
    for bad in (rows, -1):
        wrong = {**inputs, name: inputs[name].at[(0,) * inputs[name].ndim].set(bad)}
        with pytest.raises(UserError, match=rf"has {rows} rows, and no id {bad}"):
            jax.eval_shape(functools.partial(model.apply, **wrong), variables)  # whose ids are no arguments
        out = apply(variables, **wrong)
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(apply(variables, **inputs)))


def test_captions_by_another_vocabulary_are_refused(tmp_path: Path) -> None:
    """A run read back, or resumed, where the file that its vocabulary is in has changed meanwhile."""
    vocabulary = tmp_path / "bpe.txt"
    vocabulary.write_text("#version\nr e\nre d</w>\n")
    path, overrides, evaluator = CASES["retrieval"]
    given = {key: value for key, value in overrides.items() if key != "data.text.vocab_size"}
    given |= {"data.text.vocab_file": str(vocabulary), "train.duration": "1 steps", "data.batch_size": 16}
    every = {f"evaluators.{name}.every": "100 %" for name in ("val", "tones", "probe")}
    cfg = config.load(str(ROOT / path), {**given, **every})
    run = build.build(cfg)
    write_run(run, tmp_path / "run")
    vocabulary.write_text("#version\nr e\nre d</w>\nf o\n")
    tokenizer_of.cache_clear()  # as in a process that starts anew
    again = restore.restore_run(tmp_path / "run").run
    message = r"data\.text: gives \d+ tokens by a tokenizer of digest \w+, and the run has \d+ of \w+; put"
    with pytest.raises(UserError, match=message):
        evaluator.check("val", again)
    with pytest.raises(UserError, match=message):
        loop.train(cfg, tmp_path / "run")
