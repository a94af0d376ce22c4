"""What a mesh asks of a model, which knows none: where activations are cut, and layers' weights made whole.

The engine says it by context (`flax.linen.logical_axis_rules`, the abstract mesh, `WEIGHTS`).
"""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Names the axes of an activation for the sharding rules in force; without rules, nothing."""
    there = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *names)) if there else x


def spec(shape: Sequence[int], *names: str | None) -> PartitionSpec:
    """Where the rules cut an activation of this shape whose axes have these names.

    A rule's mesh axes cut the first axis of that name which they divide; others stay whole (3 heads over 2).
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    cut: list[Any] = [None] * len(shape)
    for name, axes in nn.get_logical_axis_rules():
        axes = (axes,) if isinstance(axes, str) else axes or ()
        ways = math.prod(sizes[axis] for axis in axes)
        taken = {axis for each in cut for axis in each or ()}
        for i in (i for i, given in enumerate(names) if given == name):
            if axes and not taken & set(axes) and shape[i] % ways == 0:
                cut[i], taken = axes, taken | set(axes)
    return PartitionSpec(*cut)


# What is done with the weights of a layer before it uses them, `f(weights, path, depth, dtype)`: gathered,
# where they lie in shards. The stack that they are a slice of has that path and depth; `dtype` is the
# arithmetic's.
WEIGHTS: ContextVar[Callable[[Any, str, int, Any], Any] | None] = ContextVar("WEIGHTS", default=None)


def layer(
    step: Callable[..., Any], block: nn.Module, depth: int, policy: Any = None, unroll: bool = False
) -> Callable[..., Any]:
    """`step(block, ...)` as one of a loop of `depth`: rematerialised, on weights that `WEIGHTS` has seen to.

    `policy` is what the backward pass finds in memory, None for everything; but it gathers weights again.
    """
    ready = WEIGHTS.get()
    if ready is not None and not block.is_initializing():
        path, dtype = "/".join(block.path), getattr(block, "dtype", jnp.float32)
        step = nn.map_variables(step, "params", trans_in_fn=lambda tree: ready(tree, path, depth, dtype))
        policy = policy or _all_but_weights
    if policy is None:
        return step
    # Inside a loop the compiler cannot merge the recomputation with the forward pass; unrolled, it could.
    return nn.remat(step, policy=policy, prevent_cse=unroll)


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    return bool(primitive.name != "linear_call")  # what gathers, `engine.sharding` says
