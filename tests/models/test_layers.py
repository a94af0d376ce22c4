"""The layers that families share: patches, positions, attention and how it starts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from scaling.errors import UserError
from scaling.models import layers


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def init(module: nn.Module, *args: jax.Array | None) -> dict:
    return jax.jit(module.init)(jax.random.key(0), *args)["params"]


def test_patches_are_in_reading_order_with_channels_fastest() -> None:
    x = normal(0, 2, 6, 4, 3)
    patches = layers.patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(3):
        for column in range(2):
            expected = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 12)
            assert_allclose(patches[:, 2 * row + column], expected)
    assert_allclose(layers.unpatchify(patches, (3, 2), 2), x)


def test_a_patch_that_does_not_divide_the_input() -> None:
    with pytest.raises(UserError, match="patch=5: must divide the input's height and width, which are 28x30"):
        layers.patchify(jnp.zeros((1, 28, 30, 1)), 5)


def naive_sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    quarter = width // 4
    table = np.zeros((*grid, width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                table[row, column, i] = math.sin(column * frequency)
                table[row, column, quarter + i] = math.cos(column * frequency)
                table[row, column, 2 * quarter + i] = math.sin(row * frequency)
                table[row, column, 3 * quarter + i] = math.cos(row * frequency)
    return table.reshape(-1, width)


def test_sincos_positions_of_an_oblong_grid() -> None:
    assert_allclose(layers.sincos_positions((3, 5), 24), naive_sincos((3, 5), 24), atol=1e-6)


def test_sincos_positions_of_a_clip() -> None:
    table = layers.sincos_positions((2, 3, 4), 36).reshape(2, 3, 4, 36)
    assert_allclose(table[1, 2, :, 12:], np.repeat(table[1, 2, :1, 12:], 4, axis=0))  # width comes first
    assert_allclose(table[1, 2, 3, :12], layers.sincos_positions((4,), 12)[3])
    assert_allclose(table[1, 2, 3, 12:24], layers.sincos_positions((3,), 12)[2])
    assert_allclose(table[1, 2, 3, 24:], layers.sincos_positions((2,), 12)[1])
    with pytest.raises(UserError, match="width=20: must be a multiple of 6"):
        layers.sincos_positions((2, 3, 4), 20)


def test_sincos_embedding_of_times() -> None:
    t, out = np.array([0.0, 0.5, 7, 999]), np.zeros((4, 256))
    for row, time in enumerate(t):
        for i in range(128):
            angle = time * math.exp(-math.log(10000) * i / 128)
            out[row, i], out[row, 128 + i] = math.cos(angle), math.sin(angle)
    assert_allclose(layers.sincos_embedding(jnp.asarray(t, jnp.float32), 256), out, atol=1e-4)


@pytest.mark.parametrize("new", [(9, 14), (3, 4), (6, 3)])
def test_positions_are_resized_as_torch_does(new: tuple[int, int]) -> None:
    table = normal(0, 5 * 7, 8)
    image = torch.tensor(np.asarray(table)).reshape(1, 5, 7, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, new, mode="bicubic", antialias=True)
    resized = layers.resize_positions(table, (5, 7), new)
    assert_allclose(resized, expected[0].permute(1, 2, 0).reshape(-1, 8).numpy(), atol=1e-5)


def test_positions_of_the_same_grid_are_left_alone() -> None:
    table = normal(0, 35, 8)
    assert layers.resize_positions(table, (5, 7), (5, 7)) is table


def naive_attention(params: dict, x: np.ndarray, context: np.ndarray, eps: float | None = None) -> np.ndarray:
    """One example, one head and one query at a time, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    heads = p["query"]["kernel"].shape[1]

    def norm(a: np.ndarray, name: str) -> np.ndarray:
        if eps is None:
            return a
        return (a - a.mean()) / math.sqrt(a.var() + eps) * p[name]["scale"]

    out = np.zeros(x.shape) + p["out"]["bias"]
    for b, n, h in np.ndindex(*x.shape[:2], heads):
        q = norm(x[b, n] @ p["query"]["kernel"][:, h] + p["query"]["bias"][h], "norm_query")
        logits, values = [], []
        for token in context[b]:
            k = norm(token @ p["key"]["kernel"][:, h] + p["key"]["bias"][h], "norm_key")
            logits.append(q @ k / math.sqrt(len(q)))
            values.append(token @ p["value"]["kernel"][:, h] + p["value"]["bias"][h])
        weights = np.exp(logits) / np.sum(np.exp(logits))
        out[b, n] += (weights @ np.array(values)) @ p["out"]["kernel"][h]
    return out


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_attention_against_a_naive_form(qk_norm: bool, crossed: bool) -> None:
    x, context = normal(0, 2, 5, 12), normal(1, 2, 3, 12) if crossed else None
    module = layers.Attention(heads=3, qk_norm=qk_norm)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: init(module, x, context)))
    params = jax.tree.unflatten(tree, [normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])
    out = jax.jit(module.apply)({"params": params}, x, context)
    x = np.asarray(x)
    expected = naive_attention(params, x, np.asarray(context) if crossed else x, 1e-6 if qk_norm else None)
    assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads=5: must divide the width, which is 12"):
        init(layers.Attention(heads=5), jnp.zeros((1, 4, 12)))


def is_uniform(kernel: jax.Array, bound: float) -> bool:
    """Within the bound, reaching it, with the variance of a uniform distribution."""
    reaches = 0.98 * bound < float(jnp.abs(kernel).max()) <= bound
    return reaches and abs(float(kernel.std()) / (bound / math.sqrt(3)) - 1) < 0.05


def test_attention_starts_as_the_fused_kernel_would() -> None:
    width, x = 64, jnp.zeros((1, 4, 64))
    params = init(layers.Attention(heads=4), x)
    for name in ("query", "key", "value"):
        assert params[name]["kernel"].shape == (width, 4, 16)
        assert is_uniform(params[name]["kernel"], math.sqrt(6 / (4 * width)))
    assert is_uniform(params["out"]["kernel"], math.sqrt(6 / (2 * width)))
    assert all(not jnp.any(layer["bias"]) for layer in params.values())
    # Cross-attention has no fused kernel to imitate.
    params = init(layers.Attention(heads=4, kernels=layers.XAVIER), x, x)
    assert is_uniform(params["query"]["kernel"], math.sqrt(6 / (2 * width)))


def test_the_two_forms_of_gelu() -> None:
    x = np.linspace(-4, 4, 33)
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]
    tanh = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert_allclose(layers.ACTIVATION_FUNCTIONS["gelu"](jnp.asarray(x, jnp.float32)), exact, atol=1e-6)
    assert_allclose(layers.ACTIVATION_FUNCTIONS["gelu_tanh"](jnp.asarray(x, jnp.float32)), tanh, atol=1e-6)
    assert np.abs(exact - tanh).max() > 1e-4


def test_mlp_starts_xavier_uniform() -> None:
    params = init(layers.Mlp(256), jnp.zeros((1, 4, 64)))
    assert params["up"]["kernel"].shape == (64, 256)
    for layer in params.values():
        assert is_uniform(layer["kernel"], math.sqrt(6 / (64 + 256)))
        assert not jnp.any(layer["bias"])


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.layer_norm(x, "norm")


@pytest.mark.parametrize(("shift", "scale"), [(0, 1e-3), (1000, 1)], ids=["of tiny values", "far from zero"])
def test_layer_norm_against_float64(shift: float, scale: float) -> None:
    x = shift + scale * normal(0, 1, 3, 64)  # tiny values: their variance is the epsilon, 1e-6
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    out, params = jax.jit(Norm().init_with_output)(jax.random.key(0), x)
    assert set(params["params"]["norm"]) == {"scale", "bias"}
    assert_allclose(out, exact, atol=1e-4)
    half = jax.jit(Norm().apply)(params, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_each_block_of_a_stack_starts_from_its_own_draw() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return layers.stack(layers.EncoderBlock(heads=2, name="blocks"), 3, x)

    kernel = init(Net(), jnp.zeros((1, 4, 16)))["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (3, 16, 64)
    assert not jnp.allclose(kernel[0], kernel[1])
