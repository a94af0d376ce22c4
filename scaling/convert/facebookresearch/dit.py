"""DiT as in the authors' repository facebookresearch/DiT: the released files, and its training's checkpoints.

The checkpoints hold the EMA's state dict under the key "ema".
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts, rules
from scaling.convert.converter import Converter
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.dit import DiT
from scaling.models.layers import sincos_positions

IGNORED = ("^pos_embed$",)  # sines and cosines, which `source` checks
ROUNDED = 4e-3  # largest error of sines and cosines: bfloat16 rounds them by half of it
BLOCK_NAMES = dataclasses.replace(layouts.TIMM, norms=None)


def table(model: DiT) -> Rules:
    """Returns the rules for the tensors that are trained.

    Raises:
        UserError: if the authors' code does not have the model.
    """
    layouts.only(model, block="adaln-zero", qk_norm=False, frequency_shift=0, mlp_epsilon=1e-6)
    block, layers = "blocks.{i}", range(model.depth)
    return [
        *rules.linear("x_embedder.proj", "patch", shape=rules.patches(model.patch, model.patch)),
        *rules.linear("t_embedder.mlp.0", "time/up"),
        *rules.linear("t_embedder.mlp.2", "time/down"),
        *rules.tensor("y_embedder.embedding_table.weight", "label/embedding"),
        *layouts.blocks(BLOCK_NAMES, block, "blocks", model.heads, layers),
        *rules.linear(f"{block}.adaLN_modulation.1", "blocks/modulation", layers),
        *rules.linear("final_layer.adaLN_modulation.1", "final/modulation"),
        *rules.linear("final_layer.linear", "final/linear"),
    ]


def source(model: DiT, tensors: Tensors, config: Mapping[str, Any] | None) -> DiT:
    """Returns the model itself, which computes its positions.

    Raises:
        UserError: if the file has other positions.
    """
    positions = tensors.get("pos_embed")
    if positions is not None:
        side = math.isqrt(positions.shape[-2]) if positions.ndim == 3 else 0
        expected = sincos_positions((side, side), model.width)[None]
        if positions.shape != expected.shape or np.abs(positions - expected).max() > ROUNDED:
            raise UserError("pos_embed: is not DiT's table of sines and cosines; no other can be loaded")
    return model


def buffers(model: DiT, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the positions for the model's own input.

    Raises:
        UserError: if the input is not square.
    """
    rows, columns = (side // model.patch for side in inputs["x"].shape[1:3])
    if rows != columns:
        raise UserError(f"resolution: must be square for this format; the input has {rows}x{columns} patches")
    return {"pos_embed": sincos_positions((rows, columns), model.width)[None]}


CONVERTER = Converter(
    table=table,
    ignored=IGNORED,
    source=source,
    buffers=buffers,
)
