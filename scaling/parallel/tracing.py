"""Tracing of functions for a mesh: logical names mean its axes, and sharded weights are gathered."""

import functools
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from scaling.models import role_of
from scaling.models.execution import EXECUTION, Execution
from scaling.parallel import attention_kernels
from scaling.parallel.sharding import ACTIVATION_AXES, path_of, spec

R = TypeVar("R")


def jit_replicated(mesh: jax.sharding.Mesh, fn: Callable[..., R]) -> Callable[..., R]:
    """Returns `fn` compiled, with results that are replicated on every process."""
    return jax.jit(trace_on_mesh(mesh, fn), out_shardings=NamedSharding(mesh, PartitionSpec()))


def trace_on_mesh(mesh: jax.sharding.Mesh, fn: Callable[..., R]) -> Callable[..., R]:
    """Returns `fn`, for `jax.jit`, to be traced with the models' logical names meaning this mesh.

    Layers gather their weights from shards if the mesh has an fsdp axis. On CPUs, linear layers have
    gradients of their own and convolutional blocks are not a loop. On GPUs and TPUs, attention is a fused
    kernel where there is one for it.
    """
    device = mesh.devices.flat[0]
    execution = Execution(
        gather=functools.partial(_gather_layer, mesh) if mesh.shape["fsdp"] > 1 else None,
        attention=attention_kernels.attention(device),
        row_major=device.platform == "cpu",
        unrolled=device.platform == "cpu",
    )

    def with_context(*args: Any) -> R:
        EXECUTION.set(execution)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(ACTIVATION_AXES):
            return fn(*args)

    @functools.wraps(fn)
    def traced(*args: Any) -> R:
        return copy_context().run(with_context, *args)  # in a copy, so that nothing stays set

    return traced


# Gathering weights. Left to itself, the compiler may move activations instead of weights, which are smaller.


def gather_unstacked(mesh: jax.sharding.Mesh, params: Any) -> Any:
    """Returns `params`, gathered along fsdp unless they are in a stack, whose layers gather their own."""

    def gather(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path = path_of(keys)
        return leaf if role_of(path).stacked else _gather_leaf(mesh, path, leaf, leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(gather, params) if mesh.shape["fsdp"] > 1 else params


def _gather_layer(mesh: jax.sharding.Mesh, weights: Any, stack: str, depth: int, dtype: Any) -> Any:
    """Returns a layer's weights, of a stack of `depth`, gathered along fsdp; kernels travel in `dtype`."""

    def gather(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path = f"{stack}/{path_of(keys)}"
        used_dtype = dtype if role_of(path).kind == "matrix" else leaf.dtype
        return _gather_leaf(mesh, path, leaf, (depth, *leaf.shape), used_dtype)

    return jax.tree_util.tree_map_with_path(gather, weights)


def _gather_leaf(
    mesh: jax.sharding.Mesh, path: str, x: jax.Array, stored: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Returns x in `dtype`, gathered along fsdp; its gradient is summed into shards in that dtype.

    `stored` is the shape in which the parameter at `path` is stored: that of x or, in a stack, with one more
    dimension in front.
    """
    sharded = spec(path, stored, x.dtype.itemsize, dict(mesh.shape))
    if "fsdp" not in sharded:
        return x
    sharded = PartitionSpec(*sharded[len(stored) - x.ndim :])
    gathered = PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharded))
    stored_dtype = x.dtype

    def forward(_: tuple[()], x: jax.Array) -> jax.Array:
        shard = jax.lax.with_sharding_constraint(x.astype(dtype), NamedSharding(mesh, sharded))
        return jax.lax.with_sharding_constraint(shard, NamedSharding(mesh, gathered))

    def backward(_: tuple[()], g: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(g, NamedSharding(mesh, sharded)).astype(stored_dtype)

    # Unlike a custom derivative, a linear function with a transpose of its own has both modes.
    return jax.custom_derivatives.linear_call(forward, backward, (), x)
