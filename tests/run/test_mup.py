"""The maximal update parametrisation: updates are of one size at every width, with one learning rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.parallel.sharding import path_of
from scaling.run import build, mup, optimizer, state
from scaling.run.build import Run
from scaling.run.options import parse_mup_base
from scaling.training import config

STEPS = 3
FLAT, GROWS = 0.25, 0.5  # slopes of log change in log width: at most, and what the standard one has

# Each family: a config, how it is made small, and the model's options at a width.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("configs/mnist_vit.py:A/14", {}),
    "dit": ("configs/mnist_dit.py:F/14", {}),
    "swin": ("configs/mnist_swin.py", {"model.depths": (2, 2)}),
    "clip": ("configs/openmoji_clip.py:ViT-F/16", {"model.depth": 1, "model.text_depth": 1}),
    "vilt": ("configs/openmoji_vilt.py:F/16", {"model.depth": 1}),
    "vivit": ("configs/mnist_vivit.py:short", {"model.depth": 1}),
}


def at_width(family: str, width: int) -> dict[str, Any]:
    """The options of a model whose heads are 8 wide."""
    heads: Any = (width // 8, width // 4) if family == "swin" else width // 8
    options = {"width": width, "heads": heads}
    return options | ({"text_width": width, "text_heads": heads} if family == "clip" else {})


def base(family: str, width: int) -> str:
    def text(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return ",".join(f"{key}={text(value)}" for key, value in at_width(family, width).items())


def make(family: str, options: Mapping[str, Any], mup_base: str, **changes: Any) -> Run:
    source, small = FAMILIES[family]
    values = {
        **small, **{f"model.{key}": value for key, value in options.items()},
        "optimizer.mup_base": mup_base, "optimizer.learning_rate": 0.01, "optimizer.warmup": "0 steps",
        "optimizer.grad_clip_norm": None, "data.batch_size": 8, **changes,
    }  # fmt: skip
    return build.build(config.load(source, values), jax.devices()[:1])


def batch_of(run: Run) -> dict[str, jax.Array]:
    rng, batch = np.random.default_rng(0), {}
    for name, spec in run.batch(8).items():
        if np.issubdtype(spec.dtype, np.integer):
            most = 255 if spec.dtype == np.uint8 else 3
            batch[name] = jax.numpy.asarray(rng.integers(0, most, spec.shape).astype(spec.dtype))
        else:
            batch[name] = jax.numpy.ones(spec.shape, spec.dtype)
    return batch


class Recorder:
    """A model that notes what it is called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.model.apply(variables, *args, **kwargs)


def activations(run: Run, params: Any, batch: Any) -> dict[str, np.ndarray]:
    """Returns the output of every module at the first call of the model, as the objective makes it."""
    objective: Any = dataclasses.replace(run.objective, model=Recorder(run.model))  # type: ignore[type-var]
    extras = state.Extras(collections={}, helpers={})
    objective.loss(params, extras, batch, jax.random.key(0), False)
    args, kwargs = objective.model.calls[0]
    kwargs = {**kwargs, "capture_intermediates": True, "mutable": ["intermediates"]}
    _, seen = run.model.apply({"params": params}, *args, **kwargs)
    leaves = jax.tree_util.tree_leaves_with_path(seen["intermediates"])
    return {jax.tree_util.keystr(keys): np.asarray(leaf, np.float64) for keys, leaf in leaves}


def changes(run: Run, batch: Any) -> dict[str, float]:
    """Returns the root mean square change of every module's output over a few steps."""
    now = state.init(run)
    before = activations(run, now.params, batch)
    step, hparams = state.make_step(run), state.traced_hparams(run)
    for _ in range(STEPS):
        now, _ = step(now, batch, hparams, {})
    after = activations(run, now.params, batch)
    return {name: float(np.sqrt(np.mean((after[name] - before[name]) ** 2))) for name in before}


def slopes(family: str, widths: tuple[int, ...], mup_base: str) -> list[float]:
    """Returns how log change grows with log width, of every module whose output changes at each."""
    found = []
    for width in widths:
        run = make(family, at_width(family, width), mup_base)
        found.append(changes(run, batch_of(run)))
    moved = [name for name in found[0] if all(each[name] > 1e-8 for each in found)]
    assert len(moved) >= 5
    logs = np.log([[each[name] for name in moved] for each in found])
    return list(np.polyfit(np.log(widths), logs, 1)[0])


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_changes_are_of_one_size_at_each_width(family: str) -> None:
    assert max(np.abs(slopes(family, (32, 256), base(family, 32)))) < FLAT


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_changes_are_of_one_size_over_widths_of_16_times(family: str) -> None:
    widths = (32, 64, 128, 256, 512)
    assert max(slopes(family, widths, base(family, 32))) < FLAT
    assert max(slopes(family, widths, "")) > GROWS


def test_at_the_width_of_its_base_a_model_is_the_standard_one() -> None:
    options, found = at_width("vit", 32), []
    for mup_base in ("", base("vit", 32)):
        run = make("vit", options, mup_base)
        batch, now = batch_of(run), state.init(run)
        now, _ = state.make_step(run)(now, batch, state.traced_hparams(run), {})
        found.append(now.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)


def test_factors_are_those_of_the_table() -> None:
    run = make("dit", at_width("dit", 128), base("dit", 32))
    found = mup.factors(run.variable_shapes["params"], mup.base_of(run).variable_shapes["params"])
    expected = {
        "blocks/mlp/up/kernel": (0.5, 0.25), "blocks/attention/out/kernel": (0.5, 0.25),
        "blocks/attention/query/kernel": (0.5, 0.25), "time/down/kernel": (0.5, 0.25),
        "final/linear/kernel": (0.25, 0.25), "patch/kernel": (1.0, 1.0), "time/up/kernel": (1.0, 1.0),
        "label/embedding": (1.0, 1.0), "blocks/mlp/up/bias": (None, 1.0),
    }  # fmt: skip
    for path, (init, rate) in expected.items():
        assert (found[path].init, found[path].rate) == pytest.approx((init, rate)), path


def test_heads_that_widen_have_their_logits_divided_by_their_width() -> None:
    """What the queries carry makes the product with keys q k / d, in units of the base's."""
    run = make("vit", {"width": 128, "heads": 4}, "width=32,heads=4")  # heads of 32, in the base of 8
    found = mup.factors(run.variable_shapes["params"], mup.base_of(run).variable_shapes["params"])
    query, key = (found[f"blocks/attention/{name}/kernel"] for name in ("query", "key"))
    assert key == mup.Factors(0.5, 0.25)
    assert (query.init, query.rate) == pytest.approx((0.5 * 0.5, 0.25 * 0.5))
    assert found["blocks/attention/query/bias"] == mup.Factors(0.5, 0.5)


def test_where_queries_are_normalised_the_norms_scale_carries_it() -> None:
    """LayerNorm would undo what the kernel carries."""
    run = make("dit", {"width": 128, "heads": 4, "qk_norm": True}, "width=32,heads=4")
    found = mup.factors(run.variable_shapes["params"], mup.base_of(run).variable_shapes["params"])
    assert found["blocks/attention/norm_query/scale"] == mup.Factors(0.5, 0.5)
    assert found["blocks/attention/norm_key/scale"] == mup.Factors(None, 1.0)
    query, key = (found[f"blocks/attention/{name}/kernel"] for name in ("query", "key"))
    assert query == key == mup.Factors(0.5, 0.25)
    scale = state.init(run).params["blocks"]["attention"]["norm_query"]["scale"]
    np.testing.assert_allclose(scale, 0.5, rtol=1e-6)


def test_initial_spreads_are_the_bases_by_their_factors() -> None:
    run = make("clip", at_width("clip", 256), base("clip", 32))
    mine, other = (
        {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state.init(each).params)}
        for each in (run, mup.base_of(run))
    )
    powers = {"image/patch/kernel": 0.0, "image/projection/kernel": -1.0, "text/blocks/mlp/up/kernel": -0.5}
    for path, power in powers.items():
        ratio = np.sqrt(np.mean(mine[path] ** 2) / np.mean(other[path] ** 2))
        assert ratio == pytest.approx(8.0**power, rel=1e-3), path


def test_decay_depends_on_no_width() -> None:
    options = config.load("configs/mnist_vit.py:A/14", {"optimizer.weight_decay": 0.1}).optimizer
    params = {"head": {"kernel": jax.numpy.ones((4, 2)), "bias": jax.numpy.ones(2)}}
    update = optimizer.make_update(options, 0, 10, rates=lambda p: jax.tree.map(lambda _: 0.25, p))
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    start = optimizer.transform(options).init(params)
    hparams = {"learning_rate": jax.numpy.float32(0.1), "weight_decay": jax.numpy.float32(0.1)}
    moved, *_ = update(zeros, start, params, jax.numpy.int32(0), hparams)
    np.testing.assert_allclose(moved["head"]["kernel"], 1 - 0.1 * 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("mup_base", "error"),
    [
        ("depth=1", r"optimizer\.mup_base: blocks/.* in the base .*; change the width alone"),
        ("wide=1", r"optimizer\.mup_base='wide=1': wide is no option of the model"),
        ("width", r"mup_base='width': must be options of the model, as 'width=32,heads=4'"),
    ],
)
def test_a_base_that_is_none_is_one_line(mup_base: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        state.init(make("vit", at_width("vit", 32), mup_base))


def test_it_is_adams() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name='sgd': must be adamw for all, with mup_base"):
        make("vit", at_width("vit", 32), "width=16", **{"optimizer.name": "sgd"})
    assert parse_mup_base("width=32,heads=4x8") == {"width": 32, "heads": (4, 8)}
