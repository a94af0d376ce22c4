"""Parts shared by the families' variants: a size's row, the string `SIZE/PATCH`, and checked options."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn

from scaling.errors import UserError
from scaling.validation import default_options, option_types, parse_options

Variant = tuple[str, dict[str, Any]]  # arguments of `make`: ("XL/2", {"block": "adaln"})
M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class TransformerSize:
    """A row of a size table, with the data that the size is meant for."""

    depth: int
    width: int
    heads: int
    shape: tuple[int, int, int]  # [H, W, C] of an input
    num_classes: int = 1000

    def fields(self, patch: int) -> dict[str, int]:
        """Returns the size's values under the field names that every family's module gives them."""
        return {
            "patch": patch,
            "depth": self.depth,
            "width": self.width,
            "heads": self.heads,
            "num_classes": self.num_classes,
        }


DIGIT = (28, 28, 1)  # [H, W, C] of the images that the small sizes are for


def small(depth: int, width: int, heads: int) -> TransformerSize:
    return TransformerSize(depth, width, heads, shape=DIGIT, num_classes=10)


# The ladder of small sizes: much smaller than any published size, for data such as MNIST on a laptop, and the
# same for every family. A, F, P, N and U are atto, femto, pico, nano and micro, after timm.
# Heads are 8 wide: with one or two wide heads, attention between small patches learns several times slower.
# Families without one patch and one width (ResNet, Swin) have sizes A, F, P and N of their own.
LADDER = {
    "A": small(depth=2, width=16, heads=2),
    "F": small(depth=2, width=32, heads=4),
    "P": small(depth=4, width=32, heads=4),
    "N": small(depth=4, width=64, heads=8),
    "U": small(depth=6, width=96, heads=12),
}
# Patch 2 makes 196 tokens, too many for the narrowest sizes to be worth their time.
LADDER_VARIANTS: tuple[Variant, ...] = tuple(
    (f"{size}/{patch}", {}) for size in LADDER for patch in ((14, 7, 4, 2) if size in "NU" else (14, 7, 4))
)


def side_lengths(resolution: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (H, W) of a resolution, which is a single side if both are equal."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def parse(variant: str, sizes: Mapping[str, TransformerSize]) -> tuple[TransformerSize, int]:
    """Returns the size and the patch that `variant` names, e.g. "XL/2".

    Raises:
        UserError: if the variant is not SIZE/PATCH, or there is no such size.
    """
    name, _, patch = variant.partition("/")
    if name not in sizes or not patch.isdecimal() or int(patch) == 0:
        raise UserError(f"model.variant={variant!r}: must be SIZE/PATCH with a SIZE of {', '.join(sizes)}")
    return sizes[name], int(patch)


def build(module: type[M], defaults: Mapping[str, Any], options: Mapping[str, Any]) -> M:
    """Returns `module(**defaults, **options)`, options taking precedence, after a check of names and values.

    Raises:
        UserError: if an option is not a field of the module, or its type does not allow the value.
    """
    chosen = parse_options(option_types(module, skip=("parent", "name")), options, "model")
    field_defaults = default_options(module, skip=("parent", "name"))
    for name, value in chosen.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (value < 0 or (value == 0 and field_defaults.get(name) != 0)):
            raise UserError(f"model.{name}={value}: must be positive")
    return module(**{**defaults, **chosen})
