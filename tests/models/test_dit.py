"""DiT: how it starts, what it accepts, and that every way to run its depth gives the same."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import flops, models
from scaling.errors import UserError
from scaling.models import dit
from tests.support import running
from tests.support.running import KEY, jit, largest_error, named, random_params, run

BLOCKS = ("in-context", "cross-attention", "adaln", "adaln-zero")
SMALL = {"depth": 3, "width": 16, "heads": 2, "num_classes": 10, "patch": 2}


def batch(height: int = 4, width: int = 6, channels: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, height, width, channels)), jnp.float32)
    return {"x": x, "t": jnp.array([3.0, 700.0]), "y": jnp.array([4, 10])}


@pytest.fixture(scope="module")
def started() -> Any:
    """DiT-S/2 with one block, as it starts."""
    model, inputs = models.make("dit", "S/2", depth=1, num_classes=99), models.inputs("dit", "S/2")
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
    return jax.device_get(jit(lambda: model.init(KEY, **zeros))())["params"]


def test_names_and_shapes_of_the_parameters(started: Any) -> None:
    assert {name: leaf.shape for name, leaf in named(started).items()} == {
        "patch/kernel": (16, 384), "patch/bias": (384,),
        "time/up/kernel": (256, 384), "time/up/bias": (384,),
        "time/down/kernel": (384, 384), "time/down/bias": (384,),
        "label/embedding": (100, 384),
        "blocks/modulation/kernel": (1, 384, 6 * 384), "blocks/modulation/bias": (1, 6 * 384),
        **{f"blocks/attention/{n}/kernel": (1, 384, 6, 64) for n in ("query", "key", "value")},
        **{f"blocks/attention/{n}/bias": (1, 6, 64) for n in ("query", "key", "value")},
        "blocks/attention/out/kernel": (1, 6, 64, 384), "blocks/attention/out/bias": (1, 384),
        "blocks/mlp/up/kernel": (1, 384, 1536), "blocks/mlp/up/bias": (1, 1536),
        "blocks/mlp/down/kernel": (1, 1536, 384), "blocks/mlp/down/bias": (1, 384),
        "final/modulation/kernel": (384, 768), "final/modulation/bias": (768,),
        "final/linear/kernel": (384, 32), "final/linear/bias": (32,),
    }  # fmt: skip


def test_weights_start_as_in_the_paper(started: Any) -> None:
    def bound(kernel: np.ndarray) -> float:
        assert float(kernel.std()) == pytest.approx(float(np.abs(kernel).max()) / math.sqrt(3), rel=0.03)
        return float(np.abs(kernel).max())

    blocks = started["blocks"]
    assert bound(started["patch"]["kernel"]) == pytest.approx(math.sqrt(6 / (16 + 384)), rel=0.01)
    for name in ("query", "key", "value"):  # as slices of the fused kernel [384, 3 * 384]
        assert bound(blocks["attention"][name]["kernel"]) == pytest.approx(math.sqrt(6 / (4 * 384)), rel=0.01)
    assert bound(blocks["attention"]["out"]["kernel"]) == pytest.approx(math.sqrt(6 / (2 * 384)), rel=0.01)
    assert bound(blocks["mlp"]["up"]["kernel"]) == pytest.approx(math.sqrt(6 / (5 * 384)), rel=0.01)
    assert bound(blocks["mlp"]["down"]["kernel"]) == pytest.approx(math.sqrt(6 / (5 * 384)), rel=0.01)
    for kernel in (started["time"]["up"], started["time"]["down"], {"kernel": started["label"]["embedding"]}):
        assert float(kernel["kernel"].std()) == pytest.approx(0.02, rel=0.02)
        assert float(np.abs(kernel["kernel"]).max()) > 0.06  # a normal distribution, not cut off
    for layer in (blocks["modulation"], started["final"]["modulation"], started["final"]["linear"]):
        assert not np.any(layer["kernel"])
    biases = [leaf for name, leaf in named(started).items() if name.endswith("/bias")]
    assert len(biases) == 12
    assert not any(np.any(bias) for bias in biases)


@pytest.mark.parametrize("block", BLOCKS)
def test_it_starts_by_predicting_zero(block: Any) -> None:
    model, inputs = dit.DiT(**SMALL, block=block), batch()
    out, _ = jit(model.init_with_output)(KEY, **inputs)
    assert out.shape == (2, 4, 6, 6)
    assert not jnp.any(out)


def test_an_adaln_zero_block_starts_as_the_identity() -> None:
    block, x, c = dit.AdaLNBlock(heads=2), jnp.ones((2, 5, 16)), jnp.ones((2, 16))
    x = x * jnp.arange(16, dtype=jnp.float32)[None, None]
    out, _ = jit(block.init_with_output)(KEY, x, c)
    assert_allclose(out, x)
    out, _ = jit(dit.AdaLNBlock(heads=2, gated=False).init_with_output)(KEY, x, c)
    assert not jnp.allclose(out, x)


def gradient_error(grads: Any, expected: Any) -> float:
    """The largest error of a gradient, relative to its tensor's largest or a thousandth of the model's."""
    floor = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(expected))
    errors = jax.tree.map(lambda g, e: np.abs(g - e).max() / max(np.abs(e).max(), floor), grads, expected)
    return max(jax.tree.leaves(errors))


@pytest.fixture(scope="module")
def scanned() -> Any:
    model, inputs = dit.DiT(**SMALL), batch()
    params = random_params(model, **inputs, scale=0.1)
    return params, inputs, *run(model, params, **inputs)


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "full"}, {"remat": "dots", "unroll": True}], ids=str
)
def test_every_form_of_the_depth_gives_the_same(form: dict[str, Any], scanned: Any) -> None:
    params, inputs, expected, expected_grads = scanned
    out, grads = run(dit.DiT(**SMALL, **form), params, **inputs)
    assert largest_error(out, expected) < 1e-5
    assert gradient_error(grads, expected_grads) < 1e-4


def test_remat_recomputes_the_blocks_and_dots_keeps_linear_layers() -> None:
    inputs = batch()

    def macs_of_the_gradient(remat: Any) -> int:
        model = dit.DiT(**SMALL, remat=remat)
        params = jax.eval_shape(model.init, KEY, **inputs)
        return flops.macs(jax.grad(lambda p: model.apply(p, **inputs).sum()), params)

    tokens, width, batch_size = 6, 16, 2
    linear = 3 * batch_size * (12 * tokens + 6) * width**2
    attention = 3 * batch_size * 2 * tokens**2 * width
    none, full, dots = map(macs_of_the_gradient, ("none", "full", "dots"))
    assert none < dots <= none + attention
    assert dots < full <= none + linear + attention


def test_bfloat16_is_close_and_its_output_float32(scanned: Any) -> None:
    params, inputs, expected, expected_grads = scanned
    out, grads = run(dit.DiT(**SMALL, dtype="bfloat16"), params, **inputs)
    running.check_bfloat16(out, expected)
    running.check_bfloat16(grads, expected_grads)


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_mode_agrees_with_finite_differences(block: Any) -> None:
    remat = "full" if block == "adaln-zero" else "none"
    model, inputs = dit.DiT(**SMALL, block=block, qk_norm=True, remat=remat), batch()
    params = random_params(model, **inputs, scale=0.1)
    running.check_forward_mode(model, params, **inputs)


@pytest.mark.parametrize(("side", "patch"), [((6, 6), 3), ((4, 8), 4), ((8, 2), 1)])
def test_any_patch_and_size_that_fit(side: tuple[int, int], patch: int) -> None:
    model, inputs = dit.DiT(**{**SMALL, "patch": patch}, learn_sigma=False), batch(*side, channels=1)
    params = random_params(model, **inputs, scale=0.1)
    assert jax.eval_shape(model.apply, params, **inputs).shape == (2, *side, 1)
    assert model.tokens((2, *side, 1)) == side[0] * side[1] // patch**2


def test_one_set_of_weights_serves_every_size() -> None:
    model, inputs = dit.DiT(**SMALL), batch(4, 4)
    params = random_params(model, **inputs, scale=0.1)
    large = batch(8, 6)
    assert jax.tree.map(jnp.shape, random_params(model, **large)) == jax.tree.map(jnp.shape, params)
    assert jax.eval_shape(model.apply, params, **large).shape == (2, 8, 6, 6)


def test_the_null_label_is_the_last_row_of_the_table() -> None:
    model, inputs = dit.DiT(**SMALL), batch()
    params = random_params(model, **inputs, scale=0.1)
    assert params["params"]["label"]["embedding"].shape == (11, 16)
    running.check_null_label(model, params, **inputs)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries() -> None:
    model, inputs = dit.DiT(**SMALL, qk_norm=True), batch()
    params = random_params(model, **inputs, scale=0.1)
    attention = params["params"]["blocks"]["attention"]
    assert attention["norm_query"]["scale"].shape == (3, 8)
    grown = jax.tree.map(lambda x: x, params)
    grown["params"]["blocks"]["attention"]["query"] = jax.tree.map(lambda x: 3 * x, attention["query"])
    apply = jit(model.apply)
    assert_allclose(apply(grown, **inputs), apply(params, **inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("XXL/2", {}, r"variant='XXL/2': must be SIZE/PATCH with a SIZE of S, B, L, XL, A, F, P, N, U"),
        ("XL2", {}, r"variant='XL2': must be SIZE/PATCH"),
        ("XL/0", {}, r"variant='XL/0': must be SIZE/PATCH"),
        ("XL/2", {"blok": "adaln"}, r"model\.blok: no such key; did you mean model\.block\?"),
        ("XL/2", {"block": "film"}, r"model\.block='film': must be one of in-context, .*adaln-zero"),
        ("XL/2", {"depth": 0}, r"depth=0: must be positive"),
        ("XL/2", {"depth": 2.5}, r"depth=2.5: must be an integer"),
        ("XL/2", {"unroll": 1}, r"unroll=1: must be True or False"),
        ("XL/2", {"mlp_ratio": "4"}, r"mlp_ratio='4': must be a number"),
        ("XL/2", {"dtype": "float16"}, r"dtype='float16': must be one of float32, bfloat16"),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        models.make("dit", variant, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "patch=5: must divide the input's height and width, which are 32x32"),
        ({"heads": 5}, "heads=5: must divide the width, which is 384"),
        ({"width": 390, "heads": 6}, "width=390: must be a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: dict[str, Any], message: str) -> None:
    model = models.make("dit", "S/2", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **models.inputs("dit", "S/2"))
