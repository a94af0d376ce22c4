"""Swin as timm's `SwinTransformer`, as of version 0.9. Older files have Microsoft's names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts
from scaling.convert.microsoft import swin as microsoft
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.preprocessing import IMAGENET

IGNORED = microsoft.IGNORED  # in the first files of this form
NAMES = dataclasses.replace(microsoft.NAMES, head="head.fc", leads=True)


def source(model: Swin, tensors: Tensors, config: Mapping[str, Any] | None) -> Swin:
    """The model with the window of the tensors' bias tables."""
    return layouts.with_window(model, tensors, NAMES)


def table(model: Swin) -> Rules:
    """The tensors of a state dict."""
    return layouts.swin(model, NAMES)


def buffers(model: Swin, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """None: timm computes them.

    Raises: UserError where timm's function is another: the window does not divide the map of a stage, or is
    as large as it along one side only, where timm shifts the windows along the other.
    """
    for rows, columns in layouts.swin_maps(model, inputs):
        if min(rows, columns) == model.window < max(rows, columns):
            raise UserError(
                f"model.window={model.window}: timm shifts windows on a map of {rows}x{columns} tokens, and "
                "`Swin` does not; choose another window or resolution"
            )
    return {}


def preprocessing(model: Swin) -> Seen:
    """Returns what such weights usually see."""
    return usual("timm's Swin", IMAGENET, short=0.9)
