"""Roles of parameters: the names of their dimensions, and where in depth they stand.

A layer declares the roles of its parameters beside the code that makes them, a family those of its models'
own. Whatever depends on a parameter's role (how it is sharded, gathered, decayed) finds it by the parameter's
path, and an undeclared name is an error.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

from scaling.errors import UserError

# A matrix is multiplied with activations, a table has rows that are looked up, positions a row for each place
# or distance; vectors are biases, scales and single numbers.
Kind = Literal["matrix", "table", "positions", "vector"]


@dataclass(frozen=True)
class Blocks:
    """The place of residual blocks: row i of a stack [L, ...] is block `first + i * step` of its stage."""

    first: int = 0
    step: int = 1
    stacked: bool = True  # False for a single block, whose parameters have no dimension of layers


# Before, between or after the stages of blocks; None where a model's depth is not that of a stack of blocks.
Place = Literal["before", "between", "after"] | Blocks | None


@dataclass(frozen=True)
class Role:
    """The role of one parameter [layers if stacked, *fan_in, *fan_out], by the names of its dimensions."""

    kind: Kind
    fan_in: tuple[str, ...]
    fan_out: tuple[str, ...]
    place: Place = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading dimension of layers, which a loop takes one by one."""
        return isinstance(self.place, Blocks) and self.place.stacked

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of all dimensions."""
        return (*(("layer",) if self.stacked else ()), *self.fan_in, *self.fan_out)

    def at(self, place: Place) -> "Role":
        """Returns the role of a parameter at this place."""
        return dataclasses.replace(self, place=place)


@dataclass(frozen=True)
class Part:
    """The parameters and parts of a part of a model, by their names; "#" stands for any number."""

    names: Mapping[str, "Part | Role"]
    place: Place = None

    def at(self, place: Place) -> "Part":
        """Returns the part, at this place."""
        return dataclasses.replace(self, place=place)


VECTOR = Role("vector", (), ("channel",))
SCALAR = Role("vector", (), ())
EMBEDDING = Role("table", ("id",), ("feature",))
TOKEN = Role("table", ("token",), ("width",))
POSITIONS = Role("positions", ("position",), ("width",))
RELATIVE_BIAS = Role("positions", ("distance",), ("logit",))  # one logit per head

LINEAR = Part({"kernel": Role("matrix", ("in",), ("out",)), "bias": VECTOR})
NORM = Part({"scale": VECTOR, "bias": VECTOR})
EMBED = Part({"embedding": EMBEDDING})


def merged(parts: Iterable[Part]) -> Part:
    """Returns the names of all parts.

    Raises:
        ValueError: if a name has two roles.
    """
    return reduce(lambda a, b: _merge(a, b, ""), parts)  # type: ignore[arg-type, return-value]


def _merge(a: Part | Role, b: Part | Role, path: str) -> Part | Role:
    if a == b:
        return a
    if isinstance(a, Role) or isinstance(b, Role) or a.place != b.place:
        raise ValueError(f"{path.strip('/')}: has two roles, {a} and {b}; give one of them another name")
    both = {name: _merge(a.names[name], b.names[name], f"{path}/{name}") for name in a.names.keys() & b.names}
    return Part({**a.names, **b.names, **both}, a.place)


def find(part: Part, path: str) -> Role:
    """Returns the role of the parameter at `path` in a part, such as "blocks/mlp/up/kernel".

    Raises:
        UserError: if a name on the path is not declared.
    """
    node: Part | Role = part
    place: Place = None
    for name in path.split("/"):
        names = node.names if isinstance(node, Part) else {}
        child = names.get(name) or names.get(re.sub(r"\d+", "#", name))
        if child is None:
            raise UserError(
                f"parameter {path}: {name!r} has no role; declare it in `roles` of the family, or in `ROLES` "
                "of its layer (scaling/models/roles.py)"
            )
        node, place = child, child.place or place
    if isinstance(node, Part):
        raise UserError(f"parameter {path}: is a part of a model, {', '.join(node.names)}; name one of them")
    return node.at(place)
