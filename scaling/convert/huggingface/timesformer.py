"""TimeSformer as transformers' `TimesformerForVideoClassification`, with divided attention."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import rules
from scaling.convert.rules import Rules
from scaling.errors import UserError
from scaling.models.timesformer import TimeSformer
from scaling.models.vit import side_lengths

FIXED = {"attention_type": "divided_space_time", "hidden_act": "gelu", "qkv_bias": True}


def table(model: TimeSformer) -> Rules:
    """The tensors of model.safetensors."""
    embeddings, block, layers = "timesformer.embeddings", "timesformer.encoder.layer.{i}", range(model.depth)
    attention: Rules = []
    for theirs, ours in (("temporal_attention", "temporal_attention"), ("attention", "attention")):
        qkv, out = f"{block}.{theirs}.attention.qkv", f"{block}.{theirs}.output.dense"
        attention += rules.fused_attention(
            f"{qkv}.weight", f"{qkv}.bias", out, f"blocks/{ours}", model.heads, layers
        )
    return [
        *rules.linear(
            f"{embeddings}.patch_embeddings.projection",
            "patch",
            shape=rules.patches(model.patch, model.patch),
        ),
        *rules.tensor(f"{embeddings}.cls_token", "token", rules.LEADING),
        *rules.tensor(f"{embeddings}.position_embeddings", "positions", rules.LEADING),
        *rules.tensor(f"{embeddings}.time_embeddings", "temporal_positions", rules.LEADING),
        *rules.norm(f"{block}.temporal_layernorm", "blocks/norm_temporal", layers),
        *rules.norm(f"{block}.layernorm_before", "blocks/norm_attention", layers),
        *attention,
        *rules.linear(f"{block}.temporal_dense", "blocks/temporal_fc", layers),
        *rules.norm(f"{block}.layernorm_after", "blocks/norm_mlp", layers),
        *rules.linear(f"{block}.intermediate.dense", "blocks/mlp/up", layers),
        *rules.linear(f"{block}.output.dense", "blocks/mlp/down", layers),
        *rules.norm("timesformer.layernorm", "norm"),
        *rules.linear("classifier", "head"),
    ]


def config(model: TimeSformer, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises: UserError where H and W differ: transformers' layers take only one side.
    """
    height, width = side_lengths(model.resolution)
    if height != width:
        raise UserError(f"model.resolution={model.resolution}: must be square for this format")
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "layer_norm_eps": model.epsilon,
        "num_frames": model.frames,
        "image_size": height,
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        **FIXED,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says of the model, in the names of its fields.

    Raises: UserError where it is of another attention or activation.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name}={config[name]!r}: must be {value!r}, the only one that the model has")
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "epsilon": config["layer_norm_eps"],
    }
