"""What the tests of models share: random weights, gradients, how they start, how far results are apart."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

KEY = jax.random.key(0)
# Compiling is most of a test's time, and these need no fast code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
Sizes = Mapping[str, tuple[tuple[int, ...], int]]  # of kernels by name: shape, and fan in + fan out


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Of the outputs, in the sum whose gradient is compared."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def scalar(outputs: Any) -> jax.Array:
    """A sum of all outputs with random weights."""
    return sum((jnp.sum(o * weights(o.shape)) for o in jax.tree.leaves(outputs)), jnp.float32(0))


def random_params(model: nn.Module, *args: Any, scale: float = 0.2, **inputs: Any) -> Any:
    """Variables of which none is 0, so that no part of the model is silent."""
    shapes = jax.eval_shape(functools.partial(model.init, KEY), *args, **inputs)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), shapes)


def run(model: nn.Module, variables: Any, *args: Any, **inputs: Any) -> tuple[Any, Any]:
    """The output, and the gradient of a weighted sum of it with respect to the variables."""
    grads, out = jax.device_get(_gradients(model)(variables, args, inputs))
    return out, grads


@functools.cache
def _gradients(model: nn.Module) -> Callable[..., tuple[Any, Any]]:
    def loss(variables: Any, args: Any, inputs: Any) -> tuple[jax.Array, Any]:
        out = model.apply(variables, *args, **inputs)
        return scalar(out), out

    return jit(jax.grad(loss, has_aux=True))


def largest_error(value: Any, expected: Any) -> float:
    """Of a tree of arrays, relative to the largest value of all."""
    largest = max(np.abs(e).max() for e in jax.tree.leaves(expected))
    return max(
        np.abs(v - e).max() / largest for v, e in zip(*map(jax.tree.leaves, (value, expected)), strict=True)
    )


def check_bfloat16(out: Any, expected: Any) -> None:
    """What a bfloat16 model gives is float32, and exact to 8 bits: within 2 %, not as close as without."""
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype("float32")}
    assert 1e-4 < largest_error(jax.device_get(out), expected) < 2e-2


def check_forward_mode(
    model: nn.Module, variables: Any, *args: Any, step: float = 0.01, within: float = 2e-3, **inputs: Any
) -> None:
    """The derivative along the variables themselves, against finite differences."""

    @jit
    def at(nudge: float) -> tuple[Any, Any]:
        nudged = jax.tree.map(lambda p: p * (1 + nudge), variables)
        return jax.jvp(lambda v: model.apply(v, *args, **inputs), (nudged,), (variables,))

    (above, _), (below, _), (_, slope) = jax.device_get((at(step), at(-step), at(0.0)))
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)
    assert largest_error(slope, expected) < within


def check_null_label(model: nn.Module, variables: Any, **inputs: Any) -> None:
    """Of 10 classes, the label table's last row: the second example has this label, and the first has not."""
    changed = jax.tree.map(lambda x: x, variables)
    label = changed["params"]["label"]
    label["embedding"] = label["embedding"].at[10].add(1.0)
    apply = jit(model.apply)
    before, after = apply(variables, **inputs), apply(changed, **inputs)
    np.testing.assert_allclose(before[0], after[0])
    assert not np.allclose(before[1], after[1])


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their path: "blocks/mlp/up/kernel"; arrays are NumPy's, whose sums need no compilation."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf for name, leaf in flat.items()}


def block_kernels(depth: int, width: int, heads: int, prefix: str = "blocks") -> Sizes:
    """The kernels of a stack of encoder blocks, attention's q, k and v as slices of one fused kernel."""
    head = width // heads
    sizes = {f"attention/{n}": ((depth, width, heads, head), 4 * width) for n in ("query", "key", "value")}
    sizes["attention/out"] = ((depth, heads, head, width), 2 * width)
    sizes |= {"mlp/up": ((depth, width, 4 * width), 5 * width)}
    sizes |= {"mlp/down": ((depth, 4 * width, width), 5 * width)}
    return {f"{prefix}/{name}/kernel": size for name, size in sizes.items()}


def check_xavier(flat: Mapping[str, Any], sizes: Sizes, rel: float = 0.01) -> None:
    """The kernels are as large as Xavier's uniform distribution."""
    for name, (shape, fans) in sizes.items():
        assert flat[name].shape == shape, name
        assert np.abs(flat[name]).max() == pytest.approx(math.sqrt(6 / fans), rel=rel), name
