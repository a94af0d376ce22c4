"""Where arrays live: one mesh, and one table by which parameters are sharded over it.

A parameter's role names its dimensions, and the table the dimensions that each mesh axis may shard, in order
of preference. An array is replicated along an axis that divides none of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec
from optax.tree_utils import tree_map_params

from scaling import models
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


# Mesh axis -> the names of the parameters' dimensions that it may shard, the first that it divides. An axis
# takes what those before it leave.
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "tensor": ("heads", "hidden", "modulation", "feature"),
    "fsdp": ("out", "in", "id", "feature", "width"),
}


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


def spec(path: str, shape: tuple[int, ...], itemsize: int, mesh: Mapping[str, int]) -> PartitionSpec:
    """Returns how the parameter at `path` is sharded; `mesh` maps axis to size.

    Raises:
        UserError: if the parameter has no role, or another number of dimensions than its role.
    """
    dims = models.role_of(path).dims
    if len(dims) != len(shape):
        raise UserError(
            f"parameter {path}: has {len(shape)} dimensions, and its role {len(dims)} ({', '.join(dims)}); "
            "declare a stack of layers with Blocks (scaling/models/roles.py)"
        )
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) * itemsize < SMALL:
        return PartitionSpec()
    for axis, names in PARAMETER_AXES.items():
        candidates = (dims.index(name) for name in names if name in dims)
        dim = next((d for d in candidates if axes[d] is None and shape[d] % mesh[axis] == 0), None)
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

    def of_param(x: Any, sharding: Any) -> Any:
        return x if _is_masked(x) else sharding

    return tree_map_params(
        tx, of_param, opt_state, shardings, transform_non_params=lambda _: everywhere, is_leaf=_is_masked
    )


def _is_masked(x: Any) -> bool:
    """Returns whether x stands in an optimiser's state for a parameter that another optimiser updates."""
    return isinstance(x, optax.MaskedNode)


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
        dims, axes = models.role_of(path).dims, spec(path, leaf.shape, leaf.dtype.itemsize, dict(mesh.shape))
        for axis, size in sizes.items():
            if set(PARAMETER_AXES[axis]) & set(dims) and axis not in axes:
                place = f"along {axis}={size}, which divides none of its {leaf.shape}"
                notes.append(f"{path} is replicated {place}")
    if small and sizes:
        notes.append(f"{small} arrays under {SMALL // 1024} KiB are replicated everywhere")
    return notes
