"""Where arrays live: one mesh, and rules by path that shard parameters over it.

A rule names, for a parameter path, the dimensions (counted from the end, so that the stacked layer dimension
does not shift them) that each mesh axis may shard, in order of preference. The first rule whose pattern
matches applies. An array is replicated along an axis that divides none of its dimensions.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec
from optax.tree_utils import tree_map_params

from scaling.errors import UserError
from scaling.parallel.mesh import AXES, Mesh

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 64 * 1024  # bytes below which an array is replicated

# A model's name for a dimension of activations -> mesh axes. Each axis shards the first dimension it divides.
ACTIVATION_AXES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("space_time", "tensor"),  # tokens of joint attention over a video, of which there are many
    ("token", None),
    ("embed", None),
)


@dataclass(frozen=True)
class ShardingRule:
    """The dimensions along which mesh axes may shard parameters whose path matches `pattern`."""

    pattern: str
    fsdp: tuple[int, ...] = ()
    tensor: tuple[int, ...] = ()


# A dense kernel is [..., in, out], an attention kernel [..., D, heads, width] or [..., heads, width, D].
SHARDING_RULES: tuple[ShardingRule, ...] = (
    ShardingRule(r"attention/(query|key|value)/kernel$", fsdp=(-3,), tensor=(-2,)),
    ShardingRule(r"attention/(query|key|value)/bias$", tensor=(-2,)),
    ShardingRule(r"attention/out/kernel$", fsdp=(-1,), tensor=(-3,)),
    ShardingRule(r"mlp/(up|gate)/kernel$", fsdp=(-2,), tensor=(-1,)),
    ShardingRule(r"mlp/(up|gate)/bias$", tensor=(-1,)),
    ShardingRule(r"mlp/down/kernel$", fsdp=(-1,), tensor=(-2,)),
    ShardingRule(r"modulation/kernel$", fsdp=(-2,), tensor=(-1,)),
    ShardingRule(r"embedding$", fsdp=(-2, -1), tensor=(-1,)),
    ShardingRule(r"kernel$", fsdp=(-1, -2), tensor=()),
    ShardingRule(r"(positions|token)$", fsdp=(-1,)),
    ShardingRule(r"(bias|scale)$"),
)


def make_mesh(options: Mesh, devices: Iterable[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the (data, fsdp, tensor) mesh over all devices; one device is the 1 x 1 x 1 mesh.

    Raises:
        UserError: if the sizes do not multiply to the number of devices, or the mesh does not fit the slices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = options.over(len(devices))
    if sizes is None:
        raise UserError(
            f"mesh.data={options.data}, mesh.fsdp={options.fsdp}, mesh.tensor={options.tensor}: "
            f"must multiply to the {len(devices)} devices (one may be -1)"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(arranged(tuple(sizes.values()), devices), AXES, axis_types=auto)


def arranged(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as [data, fsdp, tensor], neighbours close together.

    Slices of TPUs, between which the network is slow, are apart along data alone.

    Raises:
        UserError: if data is no multiple of the number of slices.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]}: must be a multiple of the {slices} slices: fsdp and tensor lie within one"
        )
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: jax.sharding.Mesh, batch_size: int, key: str) -> NamedSharding:
    """Returns the sharding of batches, over data x fsdp.

    Raises:
        UserError: if data x fsdp does not divide the batch size, which the message calls `key`.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(f"{key}={batch_size}: must be a multiple of mesh data x fsdp = {ways}")
    return NamedSharding(mesh, BATCH)


def rule_of(path: str) -> ShardingRule:
    """Returns the first rule that matches a parameter's path.

    Raises:
        UserError: if none matches.
    """
    rule = next((r for r in SHARDING_RULES if re.search(r.pattern, path)), None)
    if rule is None:
        raise UserError(
            f"parameter {path}: no sharding rule matches; add one to scaling.parallel.sharding.SHARDING_RULES"
        )
    return rule


def spec(path: str, shape: tuple[int, ...], itemsize: int, mesh: Mapping[str, int]) -> PartitionSpec:
    """Returns how the parameter at `path` is sharded; `mesh` maps axis to size.

    Raises:
        UserError: if no rule matches the path.
    """
    rule = rule_of(path)
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) * itemsize < SMALL:
        return PartitionSpec()
    for axis, dims in (("tensor", rule.tensor), ("fsdp", rule.fsdp)):
        free = (d for d in dims if -d <= len(shape) and axes[d] is None and shape[d] % mesh[axis] == 0)
        dim = next(free, None)
        if dim is not None and mesh[axis] > 1:
            axes[dim] = axis
    return PartitionSpec(*axes)


def path_of(keys: tuple[Any, ...]) -> str:
    """Returns a tree path as text, such as "blocks/attention/query/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def param_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the same tree with a NamedSharding for each array (or ShapeDtypeStruct)."""
    sizes = dict(mesh.shape)

    def leaf_sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path_of(keys), leaf.shape, leaf.dtype.itemsize, sizes))

    return jax.tree_util.tree_map_with_path(leaf_sharding, params)


def optimizer_shardings(tx: Any, opt_state: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shardings of the optimiser's state: those of its parameters; counters are replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return tree_map_params(
        tx, lambda _, s: s, opt_state, shardings, transform_non_params=lambda _: everywhere
    )


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the same tree with a sharding for each array that replicates it."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def sharding_notes(params: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns notes for the log: large parameters that an axis should shard but does not, and small ones."""
    sizes = {axis: mesh.shape[axis] for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    notes, small = [], 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if math.prod(leaf.shape) * leaf.dtype.itemsize < SMALL:
            small += 1
            continue
        axes = spec(path, leaf.shape, leaf.dtype.itemsize, dict(mesh.shape))
        for axis, size in sizes.items():
            if getattr(rule_of(path), axis) and axis not in axes:
                place = f"along {axis}={size}, which divides none of its {leaf.shape}"
                notes.append(f"{path} is replicated {place}")
    if small and sizes:
        notes.append(f"{small} arrays under {SMALL // 1024} KiB are replicated everywhere")
    return notes
