"""Swin as Microsoft's `SwinTransformer`: the state dict under the key "model" of the released files.

timm's files had the same names before its version 0.9.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts
from scaling.convert.converter import Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.models.swin import Swin
from scaling.models.variants import side_lengths
from scaling.models.windows import relative_index, shift_mask
from scaling.preprocessing import IMAGENET

IGNORED = (r"\.relative_position_index$", r"\.attn_mask$")  # computed from the window and the resolution
NAMES = layouts.SwinNames(
    patch="patch_embed.proj",
    norm_patch="patch_embed.norm",
    norm="norm",
    head="head",
    stage="layers.{stage}",
    block=layouts.TIMM,
    bias="attn.relative_position_bias_table",
)


def source(model: Swin, tensors: Tensors, config: Mapping[str, Any] | None) -> Swin:
    """Returns the model with the window of the tensors' bias tables."""
    return layouts.with_window(model, tensors, NAMES)


def table(model: Swin) -> Rules:
    """Returns the rules for the tensors that are trained."""
    return layouts.swin(model, NAMES)


def buffers(model: Swin, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the index of relative positions in every block, and the mask of every shifted block.

    Raises:
        UserError: if the window does not divide the map of a stage, which it must in this format.
    """
    tensors: dict[str, np.ndarray] = {}
    window, shift = model.window, model.window // 2
    for stage, sides in enumerate(layouts.swin_maps(model, inputs)):
        for i in range(model.depths[stage]):
            block = f"layers.{stage}.blocks.{i}"
            tensors[f"{block}.attn.relative_position_index"] = relative_index(window, window).astype(np.int64)
            if i % 2 and shift and min(sides) > window:
                tensors[f"{block}.attn_mask"] = shift_mask(*sides, window, shift)
    return tensors


def preprocessing(model: Swin) -> Seen:
    """Returns the usual preprocessing of such weights, which at 384 pixels keeps the whole image."""
    how: dict[str, Any] = {"square": True} if max(side_lengths(model.resolution)) >= 384 else {"short": 0.875}
    return usual("Swin", IMAGENET, **how)


CONVERTER = Converter(
    table=table,
    ignored=IGNORED,
    source=source,
    buffers=buffers,
    preprocessing=preprocessing,
)
