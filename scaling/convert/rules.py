"""An outside format as a table: which of its tensors is which of ours, and how the shapes go over and back.

Every rule only moves numbers about, so that loading and then saving gives the same tensors bit for bit.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import numpy as np

Array = np.ndarray
FLOATS = "fV"  # NumPy's kinds of them; bfloat16 is a V
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Shape:
    """One outside array to the arrays of ours that it holds, and back."""

    load: Callable[[Array], tuple[Array, ...]]
    save: Callable[..., Array]


@dataclass(frozen=True)
class Rule:
    """One outside tensor, or one a layer where `theirs` holds "{i}".

    `ours` are paths in a model's variables ("params/patch/kernel"). With `layers`, the outside tensors of
    these layers are stacked, in this order, on a leading axis. `copies` are further names of the same tensor,
    and `echoes` such names that some files have.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: Shape
    layers: tuple[int, ...] | None = None
    copies: tuple[str, ...] = ()
    echoes: tuple[str, ...] = ()


Rules = list[Rule]


# Shapes. Outside kernels are PyTorch's: linear [out, in], convolution [out, in, ...].

SAME = Shape(lambda x: (x,), lambda x: x)
TRANSPOSED = Shape(lambda x: (x.T,), lambda x: x.T)
CONVOLUTION = Shape(  # [O, I, ...] <-> [..., I, O]
    lambda x: (np.moveaxis(x, (0, 1), (-1, -2)),), lambda x: np.moveaxis(x, (-1, -2), (0, 1))
)
LEADING = Shape(lambda x: (x.reshape(x.shape[1:]),), lambda x: x[None])  # [1, ...] <-> [...]


def reshaped(theirs: Sequence[int], ours: Sequence[int]) -> Shape:
    """Between two shapes of the same numbers; one size of each may be -1."""
    return Shape(lambda x: (x.reshape(ours),), lambda x: x.reshape(theirs))


def patches(*sides: int) -> Shape:
    """A patch embedding's convolution [D, C, *sides] <-> [prod(sides) * C, D], in the order of `patchify`."""

    def load(x: Array) -> tuple[Array]:
        return (np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, x.shape[0]),)

    def save(x: Array) -> Array:
        return np.moveaxis(x.reshape(*sides, -1, x.shape[-1]), (-1, -2), (0, 1))

    return Shape(load, save)


def split_heads(heads: int, parts: int = 1) -> Shape:
    """[parts * heads * d, D] <-> `parts` kernels [D, heads, d]; a bias likewise <-> [heads, d]."""

    def load(x: Array) -> tuple[Array, ...]:
        pieces = np.split(x, parts)
        return tuple(
            p.T.reshape(p.shape[1], heads, -1) if p.ndim == 2 else p.reshape(heads, -1) for p in pieces
        )

    def save(*parts: Array) -> Array:
        flat = [p.reshape(len(p), -1).T if p.ndim == 3 else p.reshape(-1) for p in parts]
        return np.concatenate(flat)

    return Shape(load, save)


def side_by_side(parts: int) -> Shape:
    """[parts * out, in] <-> `parts` kernels [in, out]; a bias likewise <-> [out]."""
    return Shape(
        lambda x: tuple(part.T for part in np.split(x, parts)), lambda *x: np.concatenate([p.T for p in x])
    )


def merged_heads(heads: int) -> Shape:
    """The projection after attention: [D, heads * d] <-> [heads, d, D]."""
    return Shape(lambda x: (x.T.reshape(heads, -1, len(x)),), lambda x: x.reshape(-1, x.shape[-1]).T)


# Layers, in the names that both sides give them.

Layers = Iterable[int] | None


def tensor(theirs: str, ours: str, shape: Shape = SAME, layers: Layers = None) -> Rules:
    """One array of the parameters."""
    return [Rule(theirs, (f"params/{ours}",), shape, None if layers is None else tuple(layers))]


def linear(
    theirs: str, ours: str, layers: Layers = None, *, bias: bool = True, shape: Shape = TRANSPOSED
) -> Rules:
    """A kernel of the given shape and, where there is one, a bias."""
    layers = None if layers is None else tuple(layers)
    rules = tensor(f"{theirs}.weight", f"{ours}/kernel", shape, layers)
    return rules + (tensor(f"{theirs}.bias", f"{ours}/bias", SAME, layers) if bias else [])


def gated(theirs: str, ours: str) -> Rules:
    """The first layer of a gated MLP, one tensor with the values before the gates."""
    return [
        Rule(f"{theirs}.{their}", (f"params/{ours}/up/{our}", f"params/{ours}/gate/{our}"), side_by_side(2))
        for their, our in (("weight", "kernel"), ("bias", "bias"))
    ]


def convolution(theirs: str, ours: str, layers: Layers = None, *, bias: bool = True) -> Rules:
    """A convolution [O, I, ...] of any rank."""
    return linear(theirs, ours, layers, bias=bias, shape=CONVOLUTION)


def norm(theirs: str, ours: str, layers: Layers = None, *, bias: bool = True) -> Rules:
    """LayerNorm, GroupNorm or RMSNorm."""
    layers = None if layers is None else tuple(layers)
    rules = tensor(f"{theirs}.weight", f"{ours}/scale", SAME, layers)
    return rules + (tensor(f"{theirs}.bias", f"{ours}/bias", SAME, layers) if bias else [])


def batch_norm(theirs: str, ours: str, layers: Layers = None) -> Rules:
    """BatchNorm with its running statistics, which stand in the collection `batch_stats`."""
    layers = None if layers is None else tuple(layers)
    statistics = [
        Rule(f"{theirs}.running_{name}", (f"batch_stats/{ours}/{name}",), SAME, layers)
        for name in ("mean", "var")
    ]
    return norm(theirs, ours, layers) + statistics


def attention(
    query: str,
    key: str,
    value: str,
    out: str,
    ours: str,
    heads: int,
    layers: Layers = None,
    *,
    bias: bool = True,
) -> Rules:
    """Multi-head attention whose query, key and value are linear layers of their own."""
    layers = None if layers is None else tuple(layers)
    rules: Rules = []
    for theirs, name in ((query, "query"), (key, "key"), (value, "value")):
        rules += tensor(f"{theirs}.weight", f"{ours}/{name}/kernel", split_heads(heads), layers)
        if bias:
            rules += tensor(f"{theirs}.bias", f"{ours}/{name}/bias", split_heads(heads), layers)
    return rules + linear(out, f"{ours}/out", layers, bias=bias, shape=merged_heads(heads))


def fused_attention(
    weight: str, bias: str | None, out: str, ours: str, heads: int, layers: Layers = None
) -> Rules:
    """Multi-head attention with query, key and value in one tensor [3D, D]; `weight` and `bias` name it."""
    layers = None if layers is None else tuple(layers)
    shape, names = split_heads(heads, 3), ("query", "key", "value")
    rules = [Rule(weight, tuple(f"params/{ours}/{n}/kernel" for n in names), shape, layers)]
    if bias is not None:
        rules.append(Rule(bias, tuple(f"params/{ours}/{n}/bias" for n in names), shape, layers))
    return rules + linear(out, f"{ours}/out", layers, shape=merged_heads(heads))


# Over and back


def names(rule: Rule) -> list[str]:
    """The outside names of a rule's tensors, one a layer, without copies."""
    return [rule.theirs] if rule.layers is None else [rule.theirs.format(i=i) for i in rule.layers]


def load(rules: Rules, tensors: Tensors) -> dict[str, Any]:
    """Variables {"params": ..., ...} from outside tensors; every name must be there."""
    flat: dict[str, Array] = {}
    for rule in rules:
        each = [rule.shape.load(tensors[name]) for name in names(rule)]
        for path, *parts in zip(rule.ours, *each, strict=True):
            flat[path] = parts[0] if rule.layers is None else np.stack(parts)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def save(rules: Rules, variables: Mapping[str, Any]) -> dict[str, Array]:
    """Outside tensors from variables: the inverse of `load`, copies included."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    tensors: dict[str, Array] = {}
    for rule in rules:
        parts = [np.asarray(flat[path]) for path in rule.ours]
        for row, name in enumerate(names(rule)):
            one = parts if rule.layers is None else [p[row] for p in parts]
            tensors[name] = np.asarray(rule.shape.save(*one), order="C")
        tensors |= dict.fromkeys(rule.copies, tensors[names(rule)[0]])
    return tensors


def faults(rules: Rules, tensors: Tensors, shapes: Mapping[str, Any], ignored: Iterable[str]) -> list[str]:
    """What keeps `tensors` from being a model of these `shapes` (a tree of variables), in words.

    Missing and extra names, tensors of another shape or that are no floats, and copies that differ. `ignored`
    are patterns of names that may be there and are not read.
    """
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    wanted = [name for rule in rules for name in (*names(rule), *rule.copies)]
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted(set(tensors) - set(wanted) - {name for rule in rules for name in rule.echoes})
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in ignored)]
    found = _beside(missing, extra)
    for rule in rules:
        needed = [flat[path].shape[rule.layers is not None :] for path in rule.ours]
        for name in names(rule):
            if name in tensors and _loaded(rule.shape, tensors[name]) != needed:
                outside = rule.shape.save(*(np.empty(shape, np.float32) for shape in needed)).shape
                found.append(f"{name} has shape {tensors[name].shape}, not {outside}")
            if name in tensors and tensors[name].dtype.kind not in FLOATS:
                found.append(f"{name} is of {tensors[name].dtype}, not of a float")
        first = names(rule)[0]
        found += [
            f"{copy} differs from {first}, of which it must be a copy"
            for copy in (*rule.copies, *rule.echoes)
            if copy in tensors and first in tensors and not np.array_equal(tensors[copy], tensors[first])
        ]
    return found


def _beside(missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Returns the faults "missing A" and "unexpected B" in turn: the first of each side by side."""
    left, found = list(extra), []
    for name in missing:
        found.append(f"missing {name}")
        if left:
            near = difflib.get_close_matches(name, left, n=1, cutoff=0.0) if len(found) == 1 else left
            found.append(f"unexpected {near[0]}")
            left.remove(near[0])
    return found + [f"unexpected {name}" for name in left]


def _loaded(shape: Shape, tensor: Array) -> list[tuple[int, ...]] | None:
    try:
        return [part.shape for part in shape.load(tensor)]
    except (ValueError, IndexError, TypeError):  # of another rank, or not divisible
        return None
