"""Hooks by which a mesh shards a model's activations and gathers its layers' weights.

Models know no mesh: `parallel.tracing` sets one by context (`flax.linen.logical_axis_rules`, the abstract
mesh, `Execution.gather`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scaling.models.execution import EXECUTION


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to the sharding of axes with these names; without a mesh, does nothing."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *names)) if mesh_shape else x


def spec(shape: Sequence[int], *names: str | None) -> PartitionSpec:
    """Returns how the rules shard an activation of this shape whose axes have these names.

    A rule's mesh axes shard the first axis of that name whose size they divide. An axis that they do not
    divide is not sharded (3 heads over 2 devices).
    """
    mesh_sizes = jax.sharding.get_abstract_mesh().shape
    partitions: list[Any] = [None] * len(shape)
    for name, mesh_axes in nn.get_logical_axis_rules():
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        ways = math.prod(mesh_sizes[axis] for axis in mesh_axes)
        used = {axis for partition in partitions for axis in partition or ()}
        for i in (i for i, axis_name in enumerate(names) if axis_name == name):
            if mesh_axes and not used & set(mesh_axes) and shape[i] % ways == 0:
                partitions[i], used = mesh_axes, used | set(mesh_axes)
    return PartitionSpec(*partitions)


def layer(
    step: Callable[..., Any], block: nn.Module, depth: int, policy: Any = None, unroll: bool = False
) -> Callable[..., Any]:
    """Returns `step(block, ...)` for a loop of `depth`: with remat, and with gathered weights.

    `policy` says what the forward pass keeps in memory for the backward pass, None for everything, except
    that gathered weights are not kept but gathered again.
    """
    gather = EXECUTION.get().gather
    if gather is not None and not block.is_initializing():
        path, dtype = "/".join(block.path), getattr(block, "dtype", jnp.float32)

        def gathered(collections: dict[str, Any]) -> dict[str, Any]:
            return {name: gather(tree, path, depth, dtype) for name, tree in collections.items()}

        step = nn.map_variables(step, "params", trans_in_fn=gathered)
        policy = policy or _keep_all_but_weights
    if policy is None:
        return step
    # Inside a loop the compiler cannot merge the recomputation with the forward pass; unrolled, it could.
    return nn.remat(step, policy=policy, prevent_cse=unroll)


def _keep_all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    return bool(primitive.name != "linear_call")  # the primitive with which `parallel.tracing` gathers
