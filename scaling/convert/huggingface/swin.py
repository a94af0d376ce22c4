"""Swin as transformers' `SwinForImageClassification`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import rules
from scaling.convert.rules import Rules
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.models.vit import side_lengths

BIAS = "relative_position_bias_table"
IGNORED = (r"relative_position_index$",)  # computed from the window; files of older versions hold it
FIXED = {  # what transformers lets a config choose and `Swin` does not
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,  # transformers gives the chosen one to the blocks alone
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}


def source(model: Swin, tensors: Mapping[str, np.ndarray]) -> Swin:
    """The model with the window of the tensors' bias tables."""
    return with_window(model, tensors.get("swin.encoder.layers.0.blocks.0.attention.self." + BIAS))


def with_window(model: Swin, table: np.ndarray | None) -> Swin:
    """The model with the window that a bias table [(2M - 1)^2, heads] is for."""
    return model if table is None else model.clone(window=(math.isqrt(len(table)) + 1) // 2)


def table(model: Swin) -> Rules:
    """The tensors of model.safetensors."""
    patch = rules.patches(model.patch, model.patch)
    made: Rules = [
        *rules.linear("swin.embeddings.patch_embeddings.projection", "patch", shape=patch),
        *rules.norm("swin.embeddings.norm", "norm_patch"),
        *rules.norm("swin.layernorm", "norm"),
        *rules.linear("classifier", "head"),
    ]
    for stage, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        layer = f"swin.encoder.layers.{stage}"
        for parity, name in enumerate(("plain", "shifted")):
            made += _blocks(
                f"{layer}.blocks.{{i}}", f"stage{stage + 1}/{name}", heads, range(parity, depth, 2)
            )
        if stage + 1 < len(model.depths):  # here a stage ends with the merging
            made += rules.norm(f"{layer}.downsample.norm", f"merging{stage + 2}/norm")
            made += rules.linear(f"{layer}.downsample.reduction", f"merging{stage + 2}/reduction", bias=False)
    return made


def _blocks(theirs: str, ours: str, heads: int, layers: range) -> Rules:
    query, key, value = (f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
    out = f"{theirs}.attention.output.dense"
    return [
        *rules.norm(f"{theirs}.layernorm_before", f"{ours}/norm_attention", layers),
        *rules.attention(query, key, value, out, f"{ours}/attention", heads, layers),
        *rules.tensor(f"{theirs}.attention.self.{BIAS}", f"{ours}/attention/relative_bias", layers=layers),
        *rules.norm(f"{theirs}.layernorm_after", f"{ours}/norm_mlp", layers),
        *rules.linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up", layers),
        *rules.linear(f"{theirs}.output.dense", f"{ours}/mlp/down", layers),
    ]


def config(model: Swin, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises: UserError for an epsilon that transformers gives to some norms only.
    """
    if model.epsilon != FIXED["layer_norm_eps"]:
        raise UserError(
            f"epsilon={model.epsilon}: must be {FIXED['layer_norm_eps']} for transformers, which has no "
            "other in its patch embedding and merging"
        )
    height, width = side_lengths(model.resolution)
    return {
        "architectures": ["SwinForImageClassification"],
        "model_type": "swin",
        "embed_dim": model.width,
        "depths": list(model.depths),
        "num_heads": list(model.heads),
        "window_size": model.window,
        "mlp_ratio": model.mlp_ratio,
        "drop_path_rate": model.drop_path,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        **FIXED,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says of the model, in the names of its fields.

    Raises: UserError for what `Swin` does not have.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name}={config[name]!r}: must be {value!r}, as no other Swin can be loaded")
    return {
        "width": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window_size"],
        "mlp_ratio": config["mlp_ratio"],
        "patch": config["patch_size"],
        "epsilon": FIXED["layer_norm_eps"],
    }
