"""Functions traced for a mesh: logical names mean its axes, and weights that lie in shards are gathered."""

import functools
import re
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from scaling.engine import kernels
from scaling.engine.sharding import ACTIVATIONS, path_of, spec
from scaling.models import attention, convolutions, placement, products

R = TypeVar("R")

STACKED = r"(^|/)((temporal_)?blocks|plain|shifted)/"  # parameters [L, ...] of L layers, in a loop


def whole(mesh: jax.sharding.Mesh, fn: Callable[..., R]) -> Callable[..., R]:
    """`fn`, compiled, with its results whole on every process."""
    return jax.jit(on(mesh, fn), out_shardings=NamedSharding(mesh, PartitionSpec()))


def on(mesh: jax.sharding.Mesh, fn: Callable[..., R]) -> Callable[..., R]:
    """`fn`, for `jax.jit`: traced where the models' logical names mean this mesh.

    Layers gather their weights from shards where the mesh has an fsdp axis; on CPUs, linear layers have
    gradients of their own and convolutional blocks no loop; on GPUs and TPUs, attention is a fused kernel
    where there is one for it.
    """
    device = mesh.devices.flat[0]

    def told(*args: Any) -> R:
        placement.WEIGHTS.set(functools.partial(_layer, mesh) if mesh.shape["fsdp"] > 1 else None)
        products.ROW_MAJOR.set(device.platform == "cpu")
        convolutions.UNROLLED.set(device.platform == "cpu")
        attention.FUSED.set(kernels.attention(device))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(ACTIVATIONS):
            return fn(*args)

    @functools.wraps(fn)
    def traced(*args: Any) -> R:
        return copy_context().run(told, *args)  # which forgets what was set

    return traced


# Gathering weights. Left to itself the compiler may move activations in place of weights, which are smaller.


def gathered(mesh: jax.sharding.Mesh, params: Any) -> Any:
    """`params` with those whole along fsdp that are in no stack: its layers gather their own."""

    def one(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path = path_of(keys)
        return leaf if re.search(STACKED, path) else _gathered(mesh, path, leaf, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params) if mesh.shape["fsdp"] > 1 else params


def _layer(mesh: jax.sharding.Mesh, weights: Any, stack: str, depth: int, dtype: Any) -> Any:
    """A layer's weights, of a stack of `depth`, whole along fsdp; kernels travel in the dtype of use."""

    def one(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path = f"{stack}/{path_of(keys)}"
        assert re.search(STACKED, path), f"{path}: must match STACKED, or all layers are gathered before"
        as_used = dtype if path.endswith("kernel") else leaf.dtype
        return _gathered(mesh, path, leaf, (depth, *leaf.shape), as_used)

    return jax.tree_util.tree_map_with_path(one, weights)


def _gathered(
    mesh: jax.sharding.Mesh, path: str, x: jax.Array, stored: tuple[int, ...], dtype: Any
) -> jax.Array:
    """x in `dtype`, whole along fsdp; its gradient is summed into shards in that dtype.

    `stored` is the shape as the parameter at `path` is kept: x is that or, of a stack, one row of it.
    """
    cut = spec(path, stored, x.dtype.itemsize, dict(mesh.shape))
    if "fsdp" not in cut:
        return x
    cut = PartitionSpec(*cut[len(stored) - x.ndim :])
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in cut))
    held = x.dtype

    def forward(_: tuple[()], x: jax.Array) -> jax.Array:
        shard = jax.lax.with_sharding_constraint(x.astype(dtype), NamedSharding(mesh, cut))
        return jax.lax.with_sharding_constraint(shard, NamedSharding(mesh, whole))

    def backward(_: tuple[()], g: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(g, NamedSharding(mesh, cut)).astype(held)

    # Unlike a custom derivative, a linear function with a transpose of its own has both modes.
    return jax.custom_derivatives.linear_call(forward, backward, (), x)
