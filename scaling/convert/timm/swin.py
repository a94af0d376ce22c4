"""Swin as timm's `SwinTransformer`, as of version 0.9. Older files have Microsoft's names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts
from scaling.convert.converter import Converter
from scaling.convert.microsoft import swin as microsoft
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.preprocessing import IMAGENET

IGNORED = microsoft.IGNORED  # the first files of this form hold them
NAMES = dataclasses.replace(microsoft.NAMES, head="head.fc", leads=True)


def source(model: Swin, tensors: Tensors, config: Mapping[str, Any] | None) -> Swin:
    """Returns the model with the window of the tensors' bias tables."""
    return layouts.with_window(model, tensors, NAMES)


def table(model: Swin) -> Rules:
    """Returns the rules for the tensors of a state dict."""
    return layouts.swin(model, NAMES)


def buffers(model: Swin, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns no tensors, as timm computes them.

    Raises:
        UserError: if timm computes another function: the window does not divide the map of a stage, or is as
            large as the map along one side only, where timm shifts the windows along the other.
    """
    for rows, columns in layouts.swin_maps(model, inputs):
        if min(rows, columns) == model.window < max(rows, columns):
            raise UserError(
                f"model.window={model.window}: timm shifts windows on a map of {rows}x{columns} tokens, and "
                "`Swin` does not; choose another window or resolution"
            )
    return {}


def preprocessing(model: Swin) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("timm's Swin", IMAGENET, short=0.9)


CONVERTER = Converter(
    table=table,
    ignored=IGNORED,
    source=source,
    buffers=buffers,
    preprocessing=preprocessing,
)
