"""Swin: parity with transformers, how it starts, windows, cost, and every way to run its depth."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import SwinConfig, SwinForImageClassification

from scaling import flops
from scaling.convert.huggingface import swin as huggingface_swin
from scaling.convert.rules import load
from scaling.errors import UserError
from scaling.models import swin, table, vit
from tests.support import parity, running
from tests.support.running import KEY, jit, largest_error, named, random_params, run

# Maps of 7x9 and 4x5: padding of patches, windows and mergings, and shifts in both stages.
SMALL: dict[str, Any] = dict(patch=2, width=8, depths=(2, 4), heads=(1, 2), window=3, num_classes=7)
STAGE: dict[str, Any] = SMALL | dict(depths=(4,), heads=(2,))


def images(height: int = 13, width: int = 18, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, height, width, 3)).astype(np.float32)


# Parity


def clip(reference: Any, stage: int, window: int) -> None:
    """Lets a stage's bias tables serve a smaller window, where transformers itself stops with an error."""
    for block in reference.swin.encoder.layers[stage].blocks:
        bias = block.attention.relative_position_bias
        side = bias.window_size[0]
        tokens = [(y, x) for y in range(window) for x in range(window)]
        rows = [(y - v + side - 1) * (2 * side - 1) + x - u + side - 1 for y, x in tokens for v, u in tokens]
        bias.relative_position_index, bias.window_area = torch.tensor(rows), window * window


def test_against_transformers_with_padding_shifts_and_a_clipped_window() -> None:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[4, 2], num_heads=[1, 2], window_size=5,
        num_labels=7, mlp_ratio=3.0,
    )  # fmt: skip
    reference = SwinForImageClassification(config).eval().double()
    parity.randomise(reference, 0.6)  # enough for the two forms of GELU to differ
    for module in reference.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5  # each of them shows
    clip(reference, stage=1, window=4)
    x = images(21, 13)
    out = reference.swin(
        torch.from_numpy(x).double().permute(0, 3, 1, 2),
        output_hidden_states=True,
        output_hidden_states_before_downsampling=True,
    )
    maps = tuple(each.permute(0, 2, 3, 1) for each in out.reshaped_hidden_states[1:])
    assert [tuple(each.shape[1:3]) for each in maps] == [(11, 7), (6, 4)]

    model = swin.Swin(
        patch=2, width=8, depths=(4, 2), heads=(1, 2), window=5, num_classes=7, mlp_ratio=3.0, epsilon=0.5
    )  # fmt: skip
    rules = huggingface_swin.table(model)
    variables = load(rules, parity.saved(reference))
    ours = jit(functools.partial(model.apply, method="feature_maps"))(variables, x)
    for one, expected in zip(ours, maps, strict=True):
        assert largest_error(np.asarray(one), expected.detach().numpy()) < 1e-4
    logits = reference.classifier(out.pooler_output)
    parity.compare(model, rules, {"x": x}, reference, logits)


@pytest.mark.slow
def test_full_size_against_transformers() -> None:
    reference = SwinForImageClassification(SwinConfig(num_labels=1000)).eval()
    parity.randomise(reference, 0.08)
    with torch.no_grad():  # as large as it takes for masks, offsets and the two forms of GELU to show
        for name, parameter in reference.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1
            if name.endswith("relative_position_bias_table"):
                parameter *= 20
    x, model = images(224, 224, batch=1), swin.make("T")
    out = reference(torch.from_numpy(x).permute(0, 3, 1, 2)).logits
    parity.compare(model, huggingface_swin.table(model), {"x": x}, reference, out)


# Parameters


def test_names_shapes_and_start_of_the_parameters() -> None:
    model = swin.make("T", depths=(2, 2), heads=(3, 6))
    key = jax.random.key(0, impl="unsafe_rbg")  # quick to compile
    flat = named(jax.device_get(jit(model.init)(key, images(14, 14)))["params"])
    kernels, zeros, ones = {}, {}, {}
    for stage, width, heads in ((1, 96, 3), (2, 192, 6)):
        for name in (f"stage{stage}/plain", f"stage{stage}/shifted"):
            for each in ("query", "key", "value"):
                kernels[f"{name}/attention/{each}/kernel"] = (1, width, heads, 32)
                zeros[f"{name}/attention/{each}/bias"] = (1, heads, 32)
            kernels[f"{name}/attention/out/kernel"] = (1, heads, 32, width)
            kernels[f"{name}/attention/relative_bias"] = (1, 169, heads)
            kernels[f"{name}/mlp/up/kernel"] = (1, width, 4 * width)
            kernels[f"{name}/mlp/down/kernel"] = (1, 4 * width, width)
            for each in ("attention/out", "mlp/down", "norm_attention", "norm_mlp"):
                zeros[f"{name}/{each}/bias"] = (1, width)
            zeros[f"{name}/mlp/up/bias"] = (1, 4 * width)
            ones |= {f"{name}/norm_attention/scale": (1, width), f"{name}/norm_mlp/scale": (1, width)}
    kernels |= {"merging2/reduction/kernel": (384, 192), "head/kernel": (192, 1000)}
    zeros |= {"merging2/norm/bias": (384,), "head/bias": (1000,)}
    zeros |= {"norm/bias": (192,), "norm_patch/bias": (96,)}
    ones |= {"merging2/norm/scale": (384,), "norm/scale": (192,), "norm_patch/scale": (96,)}
    for name, shape in kernels.items():
        assert flat[name].shape == shape
        assert flat[name].std() == pytest.approx(0.02, rel=0.1), name
    assert {n: leaf.shape for n, leaf in flat.items() if not np.any(leaf)} == zeros
    assert {n: leaf.shape for n, leaf in flat.items() if np.all(leaf == 1)} == ones
    for name, shape in {"patch/kernel": (48, 96), "patch/bias": (96,)}.items():
        assert flat[name].shape == shape
        assert np.abs(flat[name]).max() == pytest.approx(48**-0.5, rel=0.05)
        assert flat[name].std() == pytest.approx((3 * 48) ** -0.5, rel=0.1)
    assert set(flat) == {*kernels, *zeros, *ones, "patch/kernel", "patch/bias"}


def test_no_parameter_depends_on_the_input() -> None:
    model = swin.Swin(**SMALL)
    shapes = [jax.eval_shape(model.init, KEY, images(*sides)) for sides in ((2, 2), (13, 18), (64, 40))]
    assert shapes[0] == shapes[1] == shapes[2]


# The same function however it is run


@pytest.fixture(scope="module")
def scanned() -> Any:
    model, x = swin.Swin(**STAGE), images()
    params = random_params(model, x, scale=0.4)
    return params, x, *run(model, params, x)


@pytest.mark.parametrize("form", [{"unroll": True}, {"remat": "full"}], ids=str)
def test_every_form_of_the_depth_gives_the_same(form: dict[str, Any], scanned: Any) -> None:
    params, x, expected, expected_grads = scanned
    out, grads = run(swin.Swin(**STAGE, **form), params, x)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_logits_float32(scanned: Any) -> None:
    params, x, expected, _ = scanned
    running.check_bfloat16(jit(swin.Swin(**STAGE, dtype="bfloat16").apply)(params, x), expected)


def test_forward_mode_agrees_with_finite_differences(scanned: Any) -> None:
    params, x, _, _ = scanned
    running.check_forward_mode(swin.Swin(**STAGE), params, x)


def test_logits_are_a_linear_function_of_the_features(scanned: Any) -> None:
    params, x, logits, _ = scanned
    features = jit(functools.partial(swin.Swin(**STAGE).apply, method="features"))(params, x)
    assert features.shape == (2, 8)
    assert features.dtype == jnp.float32
    head = jax.device_get(params["params"]["head"])
    assert_allclose(np.asarray(features) @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


# Stochastic depth


class Scaled(nn.Module):
    """In place of stochastic depth: a branch times its rate."""

    def __call__(self, x: jax.Array, rate: jax.Array | None) -> jax.Array:
        return x if rate is None else x * rate


def test_the_rate_of_stochastic_depth_rises_over_all_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = images()
    params = random_params(swin.Swin(**SMALL), x, scale=0.4)
    rates, scaled = 0.6 * np.arange(6) / 5, jax.tree.map(np.copy, params)
    for stage, first in ((1, 0), (2, 2)):
        for second, name in enumerate(("plain", "shifted")):
            blocks = scaled["params"][f"stage{stage}"][name]
            for pair in range(len(blocks["norm_mlp"]["scale"])):
                for leaf in jax.tree.leaves((blocks["attention"]["out"], blocks["mlp"]["down"])):
                    leaf[pair] *= rates[first + 2 * pair + second]
    expected = jit(swin.Swin(**SMALL).apply)(scaled, x)
    monkeypatch.setattr(swin, "DropPath", Scaled)
    model = swin.Swin(**SMALL, drop_path=0.6)
    out = jit(functools.partial(model.apply, train=True))(params, x)
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_draws_in_training_alone(scanned: Any) -> None:
    params, x, expected, _ = scanned
    model = swin.Swin(**STAGE, drop_path=0.5)

    @functools.partial(jit, static_argnums=1)
    def apply(seed: int, train: bool) -> jax.Array:
        return model.apply(params, x, train, rngs={"dropout": jax.random.key(seed)})

    assert_allclose(apply(0, False), expected, rtol=1e-5, atol=1e-6)
    draws = [np.asarray(apply(seed, True)) for seed in range(4)]
    assert len({draw.tobytes() for draw in draws}) > 1


# Windows


@pytest.mark.parametrize("windows", [(7, 12), (12, 7), (4, 5)])
def test_bias_tables_are_resized_as_pytorch_does(windows: tuple[int, int]) -> None:
    old, new = windows
    rows = np.random.default_rng(0).standard_normal(((2 * old - 1) ** 2, 3)).astype(np.float32)
    square = torch.from_numpy(rows.T.reshape(1, 3, 2 * old - 1, 2 * old - 1))
    expected = torch.nn.functional.interpolate(square, size=(2 * new - 1,) * 2, mode="bicubic")
    resized = swin.resize_relative_bias(jnp.asarray(rows), old, new)
    assert_allclose(resized, expected.numpy().reshape(3, -1).T, atol=1e-5)
    assert swin.resize_relative_bias(rows, old, old) is rows


def test_a_window_sees_itself_and_a_shifted_one_its_neighbours() -> None:
    model = swin.Swin(**SMALL | dict(depths=(2,), heads=(1,), window=4))
    base = images(16, 16, batch=1)  # a map of 8x8
    params = random_params(model, base, scale=0.4)
    maps = jit(functools.partial(model.apply, method="feature_maps"))
    blank = jax.tree.map(np.copy, params)
    out = blank["params"]["stage1"]["shifted"]["attention"]["out"]
    out["kernel"] *= 0  # no second attention
    moved = base.copy()
    moved[:, 6:8, 6:8] += 1  # the map's token (3, 3)

    def changed(params: Any) -> np.ndarray:
        difference = np.abs(np.asarray(maps(params, moved)[0] - maps(params, base)[0]))
        return np.asarray(difference.max((0, 3)) > 1e-6)

    plain = np.zeros((8, 8), bool)
    plain[:4, :4] = True
    assert np.array_equal(changed(blank), plain)
    # Shifted by 2, rows 0-1, 2-5 and 6-7 are apart; the first window reaches the first two of these.
    reached = np.zeros((8, 8), bool)
    reached[:6, :6] = True
    assert np.array_equal(changed(params), reached)


# Cost


def by_formula(model: swin.Swin, side: int) -> tuple[int, int, int]:
    """Tokens, parameters and multiply-adds for an image of `side` that needs no padding."""
    width, side = model.width, side // 4
    macs, params = side**2 * 48 * width, 48 * width + width + 2 * width
    for stage, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        tokens, c = (side // 2**stage) ** 2, width * 2**stage
        # Equation 2, and the MLP's 8 h w C^2.
        macs += depth * (4 * tokens * c**2 + 2 * model.window**2 * tokens * c + 8 * tokens * c**2)
        params += depth * (12 * c**2 + 13 * c + (2 * model.window - 1) ** 2 * heads)
        if stage:
            macs, params = macs + tokens * 2 * c * c, params + 2 * c * c + 2 * 2 * c
    return side**2, params + 2 * c + (c + 1) * 1000, macs + c * 1000


@pytest.mark.parametrize(("variant", "options"), [("T", {}), ("B", swin.LARGE)])
def test_cost_by_formula(variant: str, options: dict[str, Any]) -> None:
    model, inputs = swin.make(variant, **options), swin.inputs(variant, **options)
    cost = table.cost(model, inputs)
    counted = cost["tokens"], cost["params"], round(cost["gmacs"] * 1e9)
    assert counted == by_formula(model, inputs["x"].shape[1])


def test_sizes_agree_with_timm() -> None:
    # Millions, and Gmacs that include normalisation and activations, of timm's model cards.
    cards = {"T": (28.29, 4.51), "S": (49.61, 8.77), "B": (87.77, 15.47), "L": (196.53, 34.53)}
    for size, (params_m, gmacs) in cards.items():
        _, params, macs = by_formula(swin.make(size), 224)
        assert round(params / 1e6, 2) == params_m
        assert macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_cost_is_linear_in_the_area_and_that_of_vit_is_not() -> None:
    def ratio(model: Any) -> float:
        inputs = [{"x": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)} for side in (448, 896)]
        variables = jax.eval_shape(model.init, KEY, **inputs[0])
        small, large = (flops.macs(lambda v, i: model.apply(v, **i), variables, i) for i in inputs)
        return large / small

    assert ratio(swin.make("T")) == pytest.approx(4, rel=1e-3)
    assert ratio(vit.make("S/16")) > 6


# Variants and options


def test_inputs_follow_the_resolution() -> None:
    assert swin.inputs("T")["x"].shape == (1, 224, 224, 3)
    assert swin.inputs("B", resolution=384, window=12)["x"].shape == (1, 384, 384, 3)
    assert swin.inputs("T", resolution=(192, 256))["x"].shape == (1, 192, 256, 3)
    assert swin.make("T").tokens((1, 30, 41, 3)) == 8 * 11


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("M", {}, "variant='M': must be one of T, S, B, L"),
        ("T", {"windows": 7}, r"model\.windows: no such key; did you mean model\.window\?"),
        ("T", {"window": 0}, r"model\.window=0: must be positive"),
        ("T", {"depths": 12}, r"model\.depths=12: must be a tuple of an integer, \.\.\."),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        swin.make(variant, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 3, 6, 2)}, r"depths=\(2, 3, 6, 2\): must be even"),
        ({"depths": (2, 0, 6, 2)}, r"depths=\(2, 0, 6, 2\): must be even and positive"),
        ({"heads": (3, 6)}, r"heads=\(3, 6\): must be one positive number for each of depths="),
        ({"heads": (3, 6, 12, 0)}, r"heads=\(3, 6, 12, 0\): must be one positive number for each"),
        ({"heads": (3, 6, 12, 25)}, "heads=25: must divide the width, which is 768"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: dict[str, Any], message: str) -> None:
    model = swin.make("T", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **swin.inputs("T"))


def test_kernels_may_start_as_xavier_has_them() -> None:
    """Those of a small size, whose bias tables still start N(0, 0.02)."""
    params = jax.device_get(jit(swin.make("N").init)(KEY, jnp.zeros((1, 28, 28, 1))))["params"]
    flat = named(params)
    for name, fans in {
        "stage1/plain/mlp/up/kernel": 64 + 256,
        "stage2/shifted/mlp/down/kernel": 512 + 128,
        "merging2/reduction/kernel": 256 + 128,
        "head/kernel": 128 + 10,
    }.items():
        bound = math.sqrt(6 / fans)
        assert np.abs(flat[name]).max() <= bound and flat[name].std() == pytest.approx(
            bound / 3**0.5, rel=0.05
        )
    assert flat["stage2/plain/attention/relative_bias"].std() == pytest.approx(0.02, rel=0.1)
