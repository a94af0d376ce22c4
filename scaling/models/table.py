"""The cost of models, counted without running them, beside the published figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from scaling import flops, models
from scaling.models import published
from scaling.models.base import HasTokens

PLAIN: dict[str, Any] = {"remat": "none", "dtype": "float32"}  # options of the form that is counted


def plain(model: nn.Module) -> nn.Module:
    """Returns the model in float32 and without remat: nothing is recomputed, or hidden in a fused kernel."""
    fields = {field.name for field in dataclasses.fields(model)}
    return model.clone(**{name: value for name, value in PLAIN.items() if name in fields})


def cost(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Counts the cost of one example's forward pass, without allocating weights.

    `inputs` are the model's arguments by name: arrays or `jax.ShapeDtypeStruct`s with a leading batch of any
    size. Returns `tokens` (of the first input: patches, or words; no class or conditioning tokens; None where
    there are none, as in a convolutional network), `params` (trainable, a count), `gmacs` (multiply-adds of
    matmuls and convolutions, in 1e9) and `gflops` (twice that).

    Raises:
        UserError: if the inputs do not fit the model.
    """
    model = plain(model)
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in inputs.items()}
    sizes: list[int] = []

    def forward(inputs: Mapping[str, Any]) -> Any:  # initialisation runs it too: one trace counts both
        out, variables = model.init_with_output(jax.random.key(0), **inputs)
        sizes.extend(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        return out

    gmacs = flops.macs(forward, one) / 1e9
    params = sum(sizes)
    tokens = model.tokens(next(iter(one.values())).shape) if isinstance(model, HasTokens) else None
    return {"tokens": tokens, "params": params, "gmacs": gmacs, "gflops": 2 * gmacs}


def rows(family: str | None = None) -> list[dict[str, Any]]:
    """Returns a row for every registered variant, of one family or of all.

    Keys: family, variant, options (those that tell the variant's rows apart), input_shape (of the first
    input), tokens, params, gmacs, gflops, and for DiT block; then published_params_m (millions),
    published_gmacs and source, which are None if nothing is published.

    Raises:
        UserError: if the family is unknown.
    """
    families = models.MODELS if family is None else {family: models.family(family)}
    return [_row(name, *variant) for name, each in families.items() for variant in each.variants]


def _row(family: str, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    model, inputs = models.make(family, variant, **options), models.inputs(family, variant, **options)
    block = {"block": model.block} if family == "dit" else {}
    figure = published.figure(family, variant, options)
    return {
        "family": family,
        "variant": variant,
        "options": options,
        **block,
        "input_shape": list(next(iter(inputs.values())).shape[1:]),
        **cost(model, inputs),
        "published_params_m": figure and figure.params_m,
        "published_gmacs": figure and figure.gmacs,
        "source": figure and figure.source,
    }


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as an aligned table, with parameters in millions and five digits."""
    header = ["family", "variant", "options", "input", "tokens", "params (M)", "published (M)"]
    header += ["gmacs (1e9)", "published", "gflops (1e9)", "source"]
    cells = [header, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        left = [line[i].ljust(widths[i]) for i in range(4)]
        right = [line[i].rjust(widths[i]) for i in range(4, 10)]
        lines.append("  ".join([*left, *right, line[10]]).rstrip())
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["family"],
        row["variant"],
        " ".join(f"{key}={value}" for key, value in row["options"].items()),
        "x".join(map(str, row["input_shape"])),
        "" if row["tokens"] is None else str(row["tokens"]),
        _five_digits(row["params"] / 1e6),
        _published(row["published_params_m"]),
        _five_digits(row["gmacs"]),
        _published(row["published_gmacs"]),
        _five_digits(row["gflops"]),
        row["source"] or "",
    ]


def _five_digits(value: float) -> str:
    return np.format_float_positional(value, precision=5, unique=False, fractional=False, trim="-")


def _published(value: float | None) -> str:
    return "" if value is None else str(value)
