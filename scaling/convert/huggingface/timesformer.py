"""TimeSformer as transformers' `TimesformerForVideoClassification`, with divided attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.timesformer import TimeSformer
from scaling.models.variants import side_lengths
from scaling.preprocessing import Preprocessing

BLOCK_NAMES = dataclasses.replace(layouts.TRANSFORMERS, qkv="attention.attention.qkv.")
POSITIONS = "timesformer.embeddings.position_embeddings"
TIMES = "timesformer.embeddings.time_embeddings"
BASE = "timesformer."
FIXED = {"attention_type": "divided_space_time", "hidden_act": "gelu", "qkv_bias": True}
FIELDS = foreign.transformers(
    "timesformer",
    compared={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 16,
        "num_frames": 8,
    },
    only={"model_type": "timesformer", **FIXED},
    free="hidden_dropout_prob attention_probs_dropout_prob drop_path_rate num_channels",
)


def table(model: TimeSformer) -> Rules:
    """Returns the rules for the tensors of model.safetensors."""
    block, layers = "timesformer.encoder.layer.{i}", range(model.depth)
    qkv, out = f"{block}.temporal_attention.attention.qkv", f"{block}.temporal_attention.output.dense"
    return [
        *rules.linear(
            "timesformer.embeddings.patch_embeddings.projection",
            "patch",
            shape=rules.patches(model.patch, model.patch),
        ),
        *rules.tensor("timesformer.embeddings.cls_token", "token", rules.LEADING),
        *rules.tensor(POSITIONS, "positions", rules.LEADING),
        *rules.tensor(TIMES, "temporal_positions", rules.LEADING),
        *rules.norm(f"{block}.temporal_layernorm", "blocks/norm_temporal", layers),
        *rules.fused_attention(
            f"{qkv}.weight", f"{qkv}.bias", out, "blocks/temporal_attention", model.heads, layers
        ),
        *rules.linear(f"{block}.temporal_dense", "blocks/temporal_fc", layers),
        *layouts.blocks(BLOCK_NAMES, block, "blocks", model.heads, layers),
        *rules.norm("timesformer.layernorm", "norm"),
        *rules.linear("classifier", "head"),
    ]


def source(model: TimeSformer, tensors: Tensors, config: Mapping[str, Any] | None) -> TimeSformer:
    """Returns the model with the frames and the resolution of the file's position tables."""
    times = tensors.get(TIMES)
    if times is not None and times.ndim == 3 and times.shape[1]:
        model = model.clone(frames=times.shape[1])
    return layouts.with_resolution(model, tensors.get(POSITIONS), model.patch)


def config(model: TimeSformer, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if H and W differ; transformers' layers take only one side.
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
        "intermediate_size": round(model.width * model.mlp_ratio),
        "layer_norm_eps": model.epsilon,
        "num_frames": model.frames,
        "image_size": height,
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        **FIXED,
        **layouts.labels(model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if attention or activation is another, or the family does not have what a field states.
    """
    config = FIELDS.read(config)
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "epsilon": config["layer_norm_eps"],
    }


def preprocessing(model: TimeSformer) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("TimeSformer", Preprocessing((0.45,), (0.225,)), short=1.0, resample="bilinear")


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    base=BASE,
    source=source,
    preprocessing=preprocessing,
)
