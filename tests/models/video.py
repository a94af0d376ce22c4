"""What the tests of the video families share: inputs, weights, gradients, and how far results are apart."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.models import vit
from tests.models import parity

KEY = jax.random.key(0)


def videos(frames: int = 4, height: int = 4, width: int = 6) -> jax.Array:
    shape = (2, frames, height, width, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def random_params(model: nn.Module, x: Any, scale: float = 0.2) -> Any:
    shapes = jax.eval_shape(model.init, KEY, x)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), shapes)


def run(model: nn.Module, params: Any, x: jax.Array) -> tuple[np.ndarray, Any]:
    """The logits, and the gradient of a weighted sum of them."""
    grads, out = jax.device_get(_gradients(model)(params, x))
    return out, grads


@functools.cache
def _gradients(model: nn.Module) -> Callable[..., tuple[Any, jax.Array]]:
    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = model.apply(params, x)
        return parity.scalar(out), out

    return parity.jit(jax.grad(loss, has_aux=True))


def features(model: nn.Module, params: Any, x: Any) -> np.ndarray:
    """Before the head."""
    return np.asarray(_features(model)({"params": params}, x))


@functools.cache
def _features(model: nn.Module) -> Callable[..., jax.Array]:
    return parity.jit(functools.partial(model.apply, method="features"))


def largest_error(value: Any, expected: Any) -> float:
    largest = max(np.abs(e).max() for e in jax.tree.leaves(expected))
    return max(
        np.abs(v - e).max() / largest for v, e in zip(*map(jax.tree.leaves, (value, expected)), strict=True)
    )


def check_closely(model: nn.Module, variables: Any, x: Any, expected: Any) -> None:
    """Outputs within 1e-5 of a float64 reference's: averages over tokens hide which form of GELU it was."""
    out = np.asarray(parity.jit(model.apply)(variables, x))
    assert largest_error(out, expected) < 1e-5


def check_forward_mode(model: nn.Module, x: jax.Array) -> None:
    """The derivative along the parameters themselves, against finite differences."""
    params = random_params(model, x)

    @parity.jit
    def at(nudge: float) -> tuple[jax.Array, jax.Array]:
        nudged = jax.tree.map(lambda p: p * (1 + nudge), params)
        return jax.jvp(lambda p: model.apply(p, x), (nudged,), (params,))

    slope = (np.asarray(at(0.01)[0]) - np.asarray(at(-0.01)[0])) / 0.02
    assert largest_error(np.asarray(at(0.0)[1]), slope) < 5e-3


def a_vit(**options: Any) -> tuple[vit.ViT, Any]:
    """A small ViT with random parameters."""
    sizes = dict(depth=2, width=16, heads=2, num_classes=5, patch=2, resolution=(4, 6))
    model = vit.ViT(**{**sizes, **options})
    return model, random_params(model, jnp.zeros((1, *vit.side_lengths(model.resolution), 3)))["params"]
