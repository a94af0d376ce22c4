"""The linear classifier: scikit-learn's on every example once, of pixels and of features."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from scaling import data
from scaling.errors import UserError
from scaling.evaluators import EVALUATORS, make
from scaling.evaluators.linear import Linear
from scaling.run import build, state
from scaling.run import config as run_config
from scaling.training import config, loop
from tests.support import measuring

Tiny = dict[str, str]


def measured(evaluator: Linear, run: build.Run, weights: Any = None) -> float:
    values = measuring.measured(evaluator, "linear", run, weights or {})
    assert values.keys() == {"linear_top1", "linear_top1_se"}
    return values["linear_top1"]


def split(run: build.Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    source = data.open_source(run.config.data, name)
    images, labels = source.read(np.arange(len(source))).values()
    return np.asarray(images, np.float64), labels


def test_pixels_are_scikit_learns_on_every_example_once(tiny: Tiny) -> None:
    """1,438 and 359 digits in batches of 100: the last ones are padded, and padding is of no class."""
    run = build.build(config.load(tiny["vit"]))
    (x, labels), (test_x, test_labels) = split(run, "train"), split(run, "test")
    mean = (x / 255).mean(0).ravel()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(x.reshape(len(x), -1) / 255 - mean, labels)
    expected = model.score(test_x.reshape(len(test_x), -1) / 255 - mean, test_labels)
    assert measured(Linear(inverse_l2=0.1, batch_size=100), run) == expected
    assert 0.8 < expected < 1.0
    assert measured(Linear(inverse_l2=0.1, iterations=1), run) < expected  # and no warning
    assert measured(Linear(inverse_l2=1e-6), run) != expected
    assert measured(Linear(inverse_l2=0.1, split="train"), run) > expected


def test_features_are_a_linear_probe(tiny: Tiny) -> None:
    run = build.build(config.load(tiny["vit"]))
    weights = state.eval_weights(state.init(run))
    (x, labels), (test_x, test_labels) = split(run, "train"), split(run, "test")

    @jax.jit
    def features(images: jax.Array) -> Any:
        return run.model.apply({"params": weights["params"]}, images, method="features")

    seen, test_seen = (
        np.asarray(features(jnp.asarray(i / 127.5 - 1, jnp.float32)), np.float64) for i in (x, test_x)
    )
    model = LogisticRegression(max_iter=1000).fit(seen - seen.mean(0), labels)
    expected = model.score(test_seen - seen.mean(0), test_labels)
    found = measured(Linear(inputs="features", batch_size=104), run, weights)
    assert found == pytest.approx(expected, abs=0.02)  # sums in another order; near-ties may fall elsewhere
    assert found != measured(Linear(), run)


def test_a_run_measures_it_at_its_end(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "config.py"
    text = Path(tiny["vit"]).read_text()
    source.write_text(
        text.replace("evaluators=dict(", 'evaluators=dict(linear=dict(name="linear", iterations=20),')
    )
    cfg = config.load(str(source))
    last = loop.train(cfg, tmp_path / "run")
    shares = {"val_top1", "val_top5", "linear_top1"}
    assert last.keys() == {"val_loss", *shares, *(f"{share}_se" for share in shares)}
    events = [e for e in loop.read_events(tmp_path / "run") if e.get("evaluator") == "linear"]
    assert [e["step"] for e in events] == [8]
    assert EVALUATORS["linear"] is Linear


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"inverse_l2": 0.0}, r"^evaluators\.linear\.inverse_l2=0\.0: must be greater than 0$"),
        ({"iterations": 0}, r"^evaluators\.linear\.iterations=0: must be at least 1$"),
        ({"inputs": "labels"}, r"^evaluators\.linear\.inputs='labels': must be one of pixels, features$"),
        ({"penalty": 1.0}, r"^evaluators\.linear\.penalty: no such key"),
    ],
)
def test_bad_options_are_named(override: dict[str, Any], said: str, tiny: Tiny) -> None:
    raw = config.load_dict(tiny["vit"])
    raw["evaluators"]["linear"] = {"name": "linear", **override}
    with pytest.raises(UserError, match=said):
        make(run_config.from_dict(raw).evaluators)


def test_what_does_not_fit_the_run_is_named(tiny: Tiny) -> None:
    vit, dit = (build.build(config.load(tiny[name])) for name in ("vit", "dit"))
    with pytest.raises(UserError, match=r"split 'validation': digits has train, test"):
        Linear(fit_split="validation").check("linear", vit)
    with pytest.raises(UserError, match=r"evaluators\.linear\.batch_size=100: must be a multiple"):
        Linear(batch_size=100).check("linear", vit)
    with pytest.raises(
        UserError, match=r"evaluators\.linear\.inputs='features': objective diffusion with dit has"
    ):
        Linear(inputs="features").check("linear", dit)
    Linear().check("linear", dit)
