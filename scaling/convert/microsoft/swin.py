"""Swin as Microsoft's `SwinTransformer`: the state dict under the key "model" of the released files.

timm's files had the same names before its version 0.9, which counts each merging to the stage after it and
calls the head `head.fc`.
"""

from collections.abc import Mapping

import numpy as np

from scaling.convert import rules
from scaling.convert.huggingface.swin import BIAS, with_window
from scaling.convert.rules import Rules
from scaling.models.swin import Swin

IGNORED = (r"\.relative_position_index$", r"\.attn_mask$")  # computed from the window and the resolution


def source(model: Swin, tensors: Mapping[str, np.ndarray]) -> Swin:
    """The model with the window of the tensors' bias tables."""
    return with_window(model, tensors.get(f"layers.0.blocks.0.attn.{BIAS}"))


def table(model: Swin) -> Rules:
    """The tensors that are trained."""
    made: Rules = [
        *rules.linear("patch_embed.proj", "patch", shape=rules.patches(model.patch, model.patch)),
        *rules.norm("patch_embed.norm", "norm_patch"),
        *rules.norm("norm", "norm"),
        *rules.linear("head", "head"),
    ]
    for stage, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        layer = f"layers.{stage}"
        for parity, name in enumerate(("plain", "shifted")):
            made += _blocks(
                f"{layer}.blocks.{{i}}", f"stage{stage + 1}/{name}", heads, range(parity, depth, 2)
            )
        if stage + 1 < len(model.depths):  # here a stage ends with the merging
            made += rules.norm(f"{layer}.downsample.norm", f"merging{stage + 2}/norm")
            made += rules.linear(f"{layer}.downsample.reduction", f"merging{stage + 2}/reduction", bias=False)
    return made


def _blocks(theirs: str, ours: str, heads: int, layers: range) -> Rules:
    qkv = f"{theirs}.attn.qkv"
    return [
        *rules.norm(f"{theirs}.norm1", f"{ours}/norm_attention", layers),
        *rules.fused_attention(
            f"{qkv}.weight", f"{qkv}.bias", f"{theirs}.attn.proj", f"{ours}/attention", heads, layers
        ),
        *rules.tensor(f"{theirs}.attn.{BIAS}", f"{ours}/attention/relative_bias", layers=layers),
        *rules.norm(f"{theirs}.norm2", f"{ours}/norm_mlp", layers),
        *rules.linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/up", layers),
        *rules.linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/down", layers),
    ]
