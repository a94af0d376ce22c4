"""What the tests of the video families share: inputs, a size, a ViT to start from, and how they start."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.models import variants, vit
from tests.support.running import KEY, Sizes, check_xavier, jit, largest_error, named, random_params

SMALL: dict[str, Any] = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "num_classes": 7,
    "patch": 2,
    "frames": 4,
    "resolution": (4, 6),
}


def videos(frames: int = 4, height: int = 4, width: int = 6) -> jax.Array:
    shape = (2, frames, height, width, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def features(model: nn.Module, params: Any, x: Any) -> np.ndarray:
    """Before the head."""
    return np.asarray(_features(model)({"params": params}, x))


@functools.cache
def _features(model: nn.Module) -> Callable[..., jax.Array]:
    return jit(functools.partial(model.apply, method="features"))


def check_closely(model: nn.Module, variables: Any, x: Any, expected: Any) -> None:
    """Outputs within 1e-5 of a float64 reference's: averages over tokens hide which form of GELU it was."""
    out = np.asarray(jit(model.apply)(variables, x))
    assert largest_error(out, expected) < 1e-5


def check_start(
    model: nn.Module,
    xavier: Sizes,
    normal: Mapping[str, tuple[int, ...]],
    zero: Mapping[str, tuple[int, ...]],
) -> None:
    """Names, shapes and start of all parameters; those not named are biases at 0 and scales of norms at 1."""
    flat = named(jax.device_get(jit(model.init)(KEY, videos()))["params"])
    check_xavier(flat, xavier, rel=0.02)
    for name, shape in normal.items():
        assert flat[name].shape == shape
        assert flat[name].std() == pytest.approx(0.02, rel=0.15)
    for name, shape in zero.items():
        assert flat[name].shape == shape
        assert not flat[name].any()
    rest = set(flat) - {*xavier, *normal, *zero}
    assert {n.rpartition("/")[2] for n in rest} == {"scale", "bias"}
    assert all((flat[n] == (1 if n.endswith("scale") else 0)).all() for n in rest)


def a_vit(**options: Any) -> tuple[vit.ViT, Any]:
    """A small ViT with random parameters."""
    sizes = dict(depth=2, width=16, heads=2, num_classes=5, patch=2, resolution=(4, 6))
    model = vit.ViT(**{**sizes, **options})
    return model, random_params(model, jnp.zeros((1, *variants.side_lengths(model.resolution), 3)))["params"]
