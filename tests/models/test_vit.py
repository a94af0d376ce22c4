"""ViT: how it starts, pooling, other resolutions, and that every way to run its depth gives the same."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import models
from scaling.errors import UserError
from scaling.models import layers, vit
from tests.support import running
from tests.support.running import KEY, block_kernels, jit, largest_error, named, random_params, run

SMALL: dict[str, Any] = {
    "depth": 3,
    "width": 16,
    "heads": 2,
    "num_classes": 7,
    "patch": 2,
    "resolution": (4, 6),
}


def images(height: int = 4, width: int = 6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3)), jnp.float32)


def test_names_shapes_and_start_of_the_parameters() -> None:
    model = models.make("vit", "Ti/16", depth=1)
    x = jnp.zeros((1, 224, 224, 3))
    flat = named(jax.device_get(jit(model.init)(KEY, x))["params"])
    sizes = {"patch/kernel": ((768, 192), 768 + 192), **block_kernels(depth=1, width=192, heads=3)}
    running.check_xavier(flat, sizes)
    assert flat["positions"].shape == (197, 192)
    assert flat["positions"].std() == pytest.approx(0.02, rel=0.02)
    zeros = {"token": (1, 192), "head/kernel": (192, 1000), "head/bias": (1000,), "norm/bias": (192,)}
    zeros |= {"patch/bias": (192,), "blocks/mlp/up/bias": (1, 768), "blocks/mlp/down/bias": (1, 192)}
    zeros |= {f"blocks/attention/{n}/bias": (1, 3, 64) for n in ("query", "key", "value")}
    zeros |= {"blocks/attention/out/bias": (1, 192), "blocks/norm_mlp/bias": (1, 192)}
    zeros |= {"blocks/norm_attention/bias": (1, 192)}
    assert {n: leaf.shape for n, leaf in flat.items() if not np.any(leaf)} == zeros
    ones = {n for n, leaf in flat.items() if np.all(leaf == 1)}
    assert ones == {"norm/scale", "blocks/norm_attention/scale", "blocks/norm_mlp/scale"}
    assert set(flat) == {*sizes, "positions", *zeros, *ones}


@pytest.fixture(scope="module")
def scanned() -> Any:
    model, x = vit.ViT(**SMALL), images()
    params = random_params(model, x)
    return params, x, *run(model, params, x)


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "full"}, {"remat": "dots", "unroll": True}], ids=str
)
def test_every_form_of_the_depth_gives_the_same(form: dict[str, Any], scanned: Any) -> None:
    params, x, expected, expected_grads = scanned
    out, grads = run(vit.ViT(**SMALL, **form), params, x)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_logits_float32(scanned: Any) -> None:
    params, x, expected, expected_grads = scanned
    out, grads = run(vit.ViT(**SMALL, dtype="bfloat16"), params, x)
    running.check_bfloat16(out, expected)
    running.check_bfloat16(grads, expected_grads)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_forward_mode_agrees_with_finite_differences(pool: Any) -> None:
    model, x = vit.ViT(**SMALL, pool=pool), images()
    running.check_forward_mode(model, random_params(model, x), x)


def test_logits_are_a_linear_function_of_the_features(scanned: Any) -> None:
    params, x, logits, _ = scanned
    features = jit(functools.partial(vit.ViT(**SMALL).apply, method="features"))(params, x)
    assert features.shape == (2, 16)
    assert features.dtype == jnp.float32
    head = jax.device_get(params["params"]["head"])
    assert_allclose(np.asarray(features) @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


def test_mean_pooling_takes_every_patch_alike() -> None:
    model, x = vit.ViT(**SMALL, pool="mean"), images()
    params = random_params(model, x)
    assert "token" not in params["params"]
    assert params["params"]["positions"].shape == (6, 16)
    params["params"]["positions"] = jnp.zeros((6, 16))  # patches then differ by their content alone
    turned = layers.unpatchify(layers.patchify(x, 2)[:, np.array([4, 2, 0, 5, 1, 3])], (2, 3), 2)
    apply = jit(model.apply)
    assert_allclose(apply(params, turned), apply(params, x), rtol=1e-4, atol=1e-4)


def test_another_resolution_resizes_the_table_and_nothing_else(scanned: Any) -> None:
    params, _, _, _ = scanned
    x = images(8, 10)
    resized = jax.tree.map(lambda p: p, params)
    table = params["params"]["positions"]
    patches = layers.resize_positions(table[1:], (2, 3), (4, 5))
    resized["params"]["positions"] = jnp.concatenate([table[:1], patches])
    made_for_it = vit.ViT(**{**SMALL, "resolution": (8, 10)})
    expected = jit(made_for_it.apply)(resized, x)
    assert_allclose(jit(vit.ViT(**SMALL).apply)(params, x), expected, rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(made_for_it.init, KEY, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)


def test_inputs_follow_the_resolution() -> None:
    shape = {"x": (1, 384, 384, 3)}
    assert {k: v.shape for k, v in models.inputs("vit", "B/16", resolution=384).items()} == shape
    assert models.inputs("vit", "B/16", resolution=(192, 256))["x"].shape == (1, 192, 256, 3)
    assert models.inputs("vit", "A/7")["x"].shape == (1, 28, 28, 1)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("G/14", {}, r"variant='G/14': must be SIZE/PATCH with a SIZE of Ti, S, B, L, H, A, F, P, N, U"),
        ("B/16", {"pooling": "mean"}, r"model\.pooling: no such key; did you mean model\.pool\?"),
        ("B/16", {"pool": "max"}, r"model\.pool='max': must be one of token, mean"),
        (
            "B/16",
            {"resolution": (224,)},
            r"resolution=\(224,\): must be an integer or a tuple of",
        ),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.make("vit", variant, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 15}, "patch=15: must divide the input's height and width, which are 224x224"),
        ({"heads": 5}, "heads=5: must divide the width, which is 768"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: dict[str, Any], message: str) -> None:
    model = models.make("vit", "B/16", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **models.inputs("vit", "B/16"))


@pytest.mark.parametrize(("pool", "extra"), [("mean", 0), ("token", 1)])
def test_positions_may_start_as_fixed_ones(pool: Literal["mean", "token"], extra: int) -> None:
    model = vit.make("A/7", pool=pool, position_init="sincos")
    x = jnp.zeros((1, 28, 28, 1))
    table = jax.jit(model.init)(KEY, x)["params"]["positions"]
    assert not table[:extra].any()
    np.testing.assert_array_equal(table[extra:], layers.sincos_positions((4, 4), 16))
    other = jax.jit(vit.make("A/7", pool=pool).init)(KEY, x)["params"]["positions"]
    assert other.shape == table.shape and (other != table).all()
