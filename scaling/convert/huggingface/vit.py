"""ViT as transformers' `ViTForImageClassification`."""

import math
from collections.abc import Mapping
from typing import Any

from scaling.convert import rules
from scaling.convert.rules import Rules, Tensors
from scaling.models.vit import ViT, side_lengths


def table(model: ViT) -> Rules:
    """The tensors of model.safetensors."""
    block, layers = "vit.encoder.layer.{i}", range(model.depth)
    query, key, value = (f"{block}.attention.attention.{n}" for n in ("query", "key", "value"))
    out = f"{block}.attention.output.dense"
    return [
        *rules.linear(
            "vit.embeddings.patch_embeddings.projection",
            "patch",
            shape=rules.patches(model.patch, model.patch),
        ),
        *rules.tensor("vit.embeddings.cls_token", "token", rules.LEADING),
        *rules.tensor("vit.embeddings.position_embeddings", "positions", rules.LEADING),
        *rules.norm(f"{block}.layernorm_before", "blocks/norm_attention", layers),
        *rules.attention(query, key, value, out, "blocks/attention", model.heads, layers),
        *rules.norm(f"{block}.layernorm_after", "blocks/norm_mlp", layers),
        *rules.linear(f"{block}.intermediate.dense", "blocks/mlp/up", layers),
        *rules.linear(f"{block}.output.dense", "blocks/mlp/down", layers),
        *rules.norm("vit.layernorm", "norm"),
        *rules.linear("classifier", "head"),
    ]


def config(model: ViT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name."""
    height, width = side_lengths(model.resolution)
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": model.epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says of the model, in the names of its fields."""
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "epsilon": config["layer_norm_eps"],
        "pool": "token",
    }


def source(model: ViT, tensors: Tensors) -> ViT:
    """The model for the resolution that the file's position table is for, taken to be square."""
    table = tensors.get("vit.embeddings.position_embeddings")
    rows, columns = (side // model.patch for side in side_lengths(model.resolution))
    if table is None or table.shape[1] == 1 + rows * columns:
        return model
    return model.clone(resolution=math.isqrt(table.shape[1] - 1) * model.patch)
