"""The linear classifier: scikit-learn's on every example once, of pixels and of features."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from scaling import data
from scaling.engine import build, config, state, train
from scaling.engine.evaluate import EVALUATORS
from scaling.engine.linear import Linear
from scaling.errors import UserError

Tiny = dict[str, str]


def measured(evaluator: Linear, built: build.Built, weights: Any = None) -> float:
    values = evaluator.run("linear", built, weights or {"collections": {}}, Path(), 0, lambda: None)
    assert values.keys() == {"linear_top1"}
    return values["linear_top1"]


def split(built: build.Built, name: str) -> tuple[np.ndarray, np.ndarray]:
    source = data.open_source(built.config.data, name)
    images, labels = source.read(np.arange(len(source))).values()
    return np.asarray(images, np.float64), labels


def test_pixels_are_scikit_learns_on_every_example_once(tiny: Tiny) -> None:
    """1,438 and 359 digits in batches of 100: the last ones are padded, and padding is of no class."""
    built = build.build(config.load(tiny["vit"]))
    (x, labels), (test_x, test_labels) = split(built, "train"), split(built, "test")
    mean = (x / 255).mean(0).ravel()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(x.reshape(len(x), -1) / 255 - mean, labels)
    expected = model.score(test_x.reshape(len(test_x), -1) / 255 - mean, test_labels)
    assert measured(Linear(c=0.1, batch_size=100), built) == expected
    assert 0.8 < expected < 1.0
    assert measured(Linear(c=0.1, iterations=1), built) < expected  # and no warning
    assert measured(Linear(c=1e-6), built) != expected
    assert measured(Linear(c=0.1, split="train"), built) > expected


def test_features_are_a_linear_probe(tiny: Tiny) -> None:
    built = build.build(config.load(tiny["vit"]))
    weights = state.inference(state.init(built))
    (x, labels), (test_x, test_labels) = split(built, "train"), split(built, "test")

    @jax.jit
    def features(images: jax.Array) -> Any:
        return built.model.apply({"params": weights["params"]}, images, method="features")

    seen, test_seen = (
        np.asarray(features(jnp.asarray(i / 127.5 - 1, jnp.float32)), np.float64) for i in (x, test_x)
    )
    model = LogisticRegression(max_iter=1000).fit(seen - seen.mean(0), labels)
    expected = model.score(test_seen - seen.mean(0), test_labels)
    found = measured(Linear(on="features", batch_size=104), built, weights)
    assert found == pytest.approx(expected, abs=0.02)  # sums in another order; near-ties may fall elsewhere
    assert found != measured(Linear(), built)


def test_a_run_measures_it_at_its_end(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "config.py"
    text = Path(tiny["vit"]).read_text()
    source.write_text(
        text.replace("evaluate=dict(", 'evaluate=dict(linear=dict(kind="linear", iterations=20),')
    )
    cfg = config.load(str(source))
    last = train.run(cfg, tmp_path / "run")
    assert last.keys() == {"val_loss", "val_top1", "val_top5", "linear_top1"}
    events = [e for e in train.read_events(tmp_path / "run") if e.get("evaluator") == "linear"]
    assert [e["step"] for e in events] == [8]
    assert EVALUATORS["linear"] is Linear


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"c": 0.0}, r"^evaluate\.linear\.c=0\.0: must be greater than 0$"),
        ({"iterations": 0}, r"^evaluate\.linear\.iterations=0: must be at least 1$"),
        ({"on": "labels"}, r"^evaluate\.linear\.on='labels': must be one of pixels, features$"),
        ({"penalty": 1.0}, r"^evaluate\.linear\.penalty: no such key"),
    ],
)
def test_bad_options_are_named(override: dict[str, Any], said: str, tiny: Tiny) -> None:
    raw = config.load_dict(tiny["vit"])
    raw["evaluate"]["linear"] = {"kind": "linear", **override}
    with pytest.raises(UserError, match=said):
        config.from_dict(raw)


def test_what_does_not_fit_the_run_is_named(tiny: Tiny) -> None:
    vit, dit = (build.build(config.load(tiny[name])) for name in ("vit", "dit"))
    with pytest.raises(UserError, match=r"split 'validation': digits has train, test"):
        Linear(fit_split="validation").check("linear", vit)
    with pytest.raises(UserError, match=r"evaluate\.linear\.batch_size=100: must be a multiple"):
        Linear(batch_size=100).check("linear", vit)
    with pytest.raises(UserError, match=r"evaluate\.linear\.on='features': objective diffusion with dit has"):
        Linear(on="features").check("linear", dit)
    Linear().check("linear", dit)
