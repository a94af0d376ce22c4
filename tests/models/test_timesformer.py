"""TimeSformer: counts, how it starts, alone and from a ViT, and the ways to run it.

Its parity stands with the converter of the format in which the reference is saved.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling.errors import UserError
from scaling.models import layers, table, timesformer
from tests.models import parity
from tests.models.video import (
    KEY,
    a_vit,
    check_forward_mode,
    features,
    largest_error,
    random_params,
    run,
    videos,
)

SMALL: dict[str, Any] = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "num_classes": 7,
    "patch": 2,
    "frames": 4,
    "resolution": (4, 6),
}


@pytest.mark.parametrize(
    ("options", "params_m", "tflops"),
    # Bertasius et al. 2021, comparison on Kinetics 400: 0.59, 5.11 and 7.14 "TFLOPs" (multiply-adds) of three
    # views. The parameters differ by the positions, which are of 28 x 28 patches in HR, of 96 frames in L.
    [({}, 121.57, 0.59), ({"frames": 16, "resolution": 448}, 122.02, 5.11), ({"frames": 96}, 121.63, 7.14)],
)
def test_counts_are_the_papers(options: dict[str, Any], params_m: float, tflops: float) -> None:
    cost = table.cost(timesformer.make("B/16", **options), timesformer.inputs("B/16", **options))
    assert round(cost["params"] / 1e6, 2) == params_m
    assert round(3 * cost["gmacs"] / 1e3, 2) == tflops
    if not options:
        assert cost["gmacs"] == pytest.approx(195.83, abs=0.005)
        assert cost["tokens"] == 8 * 14 * 14


def test_names_shapes_and_start_of_the_parameters() -> None:
    model = timesformer.TimeSformer(**{**SMALL, "width": 64})
    params = jax.device_get(parity.jit(model.init)(KEY, videos()))["params"]
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert flat["positions"].shape == (1 + 6, 64)
    assert flat["positions"].std() == pytest.approx(0.02, rel=0.15)
    zeros = {"token": (1, 64), "temporal_positions": (4, 64), "head/kernel": (64, 7)}
    zeros |= {"blocks/temporal_fc/kernel": (2, 64, 64)}
    for name, shape in zeros.items():
        assert flat[name].shape == shape
        assert not flat[name].any()
    bounds = {"patch/kernel": 12 + 64, "blocks/mlp/up/kernel": 5 * 64, "blocks/mlp/down/kernel": 5 * 64}
    for each in ("attention", "temporal_attention"):
        bounds |= {f"blocks/{each}/{n}/kernel": 4 * 64 for n in ("query", "key", "value")}
        bounds[f"blocks/{each}/out/kernel"] = 2 * 64
    for name, fans in bounds.items():
        assert np.abs(flat[name]).max() == pytest.approx(math.sqrt(6 / fans), rel=0.02), name
    rest = set(flat) - set(bounds) - set(zeros) - {"positions"}
    assert {n.rpartition("/")[2] for n in rest} == {"scale", "bias"}
    assert all((flat[n] == (1 if n.endswith("scale") else 0)).all() for n in rest)


def test_a_still_video_starts_as_the_vit() -> None:
    vit, vit_params = a_vit()
    model, x = timesformer.TimeSformer(**SMALL), videos()
    still = jnp.tile(x[:, :1], (1, 4, 1, 1, 1))
    start = random_params(model, x)["params"]
    params = timesformer.from_vit(model, start, vit, vit_params)
    expected = features(vit, vit_params, x[:, 0])
    assert_allclose(features(model, params, still), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(features(model, params, x) - expected).max() > 1e-2  # a moving one does not
    jax.tree.map(
        assert_array_equal, params["blocks"]["temporal_attention"], vit_params["blocks"]["attention"]
    )
    jax.tree.map(
        assert_array_equal, params["blocks"]["norm_temporal"], vit_params["blocks"]["norm_attention"]
    )
    jax.tree.map(assert_array_equal, params["head"], start["head"])


def test_another_vit() -> None:
    vit, vit_params = a_vit(pool="mean", resolution=(8, 6))
    model = timesformer.TimeSformer(**SMALL)
    start = random_params(model, videos())["params"]
    params = timesformer.from_vit(model, start, vit, vit_params)
    assert_array_equal(params["token"], start["token"])
    assert_array_equal(params["positions"][:1], start["positions"][:1])
    smaller = layers.resize_positions(vit_params["positions"], (4, 3), (2, 3))
    assert_array_equal(params["positions"][1:], smaller)
    vit, vit_params = a_vit(width=32)
    with pytest.raises(UserError, match=r"vit\.width=32: must be the video model's, which is 16"):
        timesformer.from_vit(model, start, vit, vit_params)


@pytest.fixture(scope="module")
def scanned() -> Any:
    model, x = timesformer.TimeSformer(**SMALL), videos()
    params = random_params(model, x)
    return params, x, *run(model, params, x)


def test_the_depth_unrolled_and_recomputed_gives_the_same(scanned: Any) -> None:
    params, x, expected, expected_grads = scanned
    out, grads = run(timesformer.TimeSformer(**SMALL, remat="full", unroll=True), params, x)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_logits_float32(scanned: Any) -> None:
    params, x, expected, _ = scanned
    out = np.asarray(parity.jit(timesformer.TimeSformer(**SMALL, dtype="bfloat16").apply)(params, x))
    assert out.dtype == np.float32
    # bfloat16 keeps 8 bits: within 2 %, and not so close that it cannot have been used.
    assert 1e-4 < largest_error(out, expected) < 2e-2


def test_logits_are_a_linear_function_of_the_features(scanned: Any) -> None:
    params, x, logits, _ = scanned
    pooled = features(timesformer.TimeSformer(**SMALL), params["params"], x)
    assert pooled.shape == (2, 16)
    head = jax.device_get(params["params"]["head"])
    assert_allclose(pooled @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


def test_forward_mode_agrees_with_finite_differences() -> None:
    check_forward_mode(timesformer.TimeSformer(**SMALL), videos())


def test_stochastic_depth_acts_in_training_alone(scanned: Any) -> None:
    params, x, expected, _ = scanned
    model = timesformer.TimeSformer(**SMALL, drop_path=0.5)
    jax.eval_shape(model.apply, params, x)  # draws nothing: there is nothing to draw from
    train = parity.jit(lambda key: model.apply(params, x, train=True, rngs={"dropout": key}))
    one, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
    assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - expected).max() > 1e-2


def test_another_size_resizes_the_tables_and_nothing_else(scanned: Any) -> None:
    params = scanned[0]["params"]
    x = videos(8, 8, 10)
    made = timesformer.TimeSformer(**{**SMALL, "frames": 8, "resolution": (8, 10)})
    table = params["positions"]
    places = layers.resize_positions(table[1:], (2, 3), (4, 5))
    moments = params["temporal_positions"]
    padded = jnp.concatenate(
        [moments[:1], moments, moments[-1:]]
    )  # each moment lies a quarter step to a side
    late = 0.75 * moments + 0.25 * padded[2:]
    early = 0.75 * moments + 0.25 * padded[:-2]
    moments = jnp.stack([early, late], axis=1).reshape(8, 16)
    resized = {**params, "temporal_positions": moments, "positions": jnp.concatenate([table[:1], places])}
    small = timesformer.TimeSformer(**SMALL)
    assert_allclose(features(small, params, x), features(made, resized, x), rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(made.init, KEY, x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)


def test_inputs_follow_the_options() -> None:
    assert timesformer.inputs("B/16")["x"].shape == (1, 8, 224, 224, 3)
    assert timesformer.inputs("B/16", frames=16, resolution=448)["x"].shape == (1, 16, 448, 448, 3)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("L/16", {}, "variant='L/16': must be SIZE/PATCH with a SIZE of B"),
        ("B/16", {"frame": 8}, r"model\.frame: no such key; did you mean model\.frames\?"),
        ("B/16", {"remat": "all"}, r"model\.remat='all': must be one of none, full, dots"),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timesformer.make(variant, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 15}, "patch=15: must divide the input's height and width, which are 224x224"),
        ({"heads": 5}, "heads=5: must divide the width, which is 768"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: dict[str, Any], message: str) -> None:
    model = timesformer.make("B/16", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **timesformer.inputs("B/16"))
