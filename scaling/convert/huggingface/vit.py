"""ViT as transformers' `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Shape, Tensors
from scaling.models.variants import side_lengths
from scaling.models.vit import ViT
from scaling.models.vivit import ViViT
from scaling.preprocessing import SYMMETRIC

FIELDS = foreign.transformers(
    "vit",
    compared={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
    },
    only={"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True},
    free="hidden_dropout_prob attention_probs_dropout_prob"
    " num_channels"  # the patch kernel's shape has them
    " encoder_stride pooler_act pooler_output_size",  # fields of other heads
)
BASE = "vit."
UNUSED = (r"^(vit\.)?pooler\.",)  # a part of the model without a head
RENAMED = {
    "transformers 5": (
        (r"(^|\.)layers\.(\d+)\.attention\.q_proj\.", r"\1encoder.layer.\2.attention.attention.query."),
        (r"(^|\.)layers\.(\d+)\.attention\.k_proj\.", r"\1encoder.layer.\2.attention.attention.key."),
        (r"(^|\.)layers\.(\d+)\.attention\.v_proj\.", r"\1encoder.layer.\2.attention.attention.value."),
        (r"(^|\.)layers\.(\d+)\.attention\.o_proj\.", r"\1encoder.layer.\2.attention.output.dense."),
        (r"(^|\.)layers\.(\d+)\.mlp\.fc1\.", r"\1encoder.layer.\2.intermediate.dense."),
        (r"(^|\.)layers\.(\d+)\.mlp\.fc2\.", r"\1encoder.layer.\2.output.dense."),
        (r"(^|\.)layers\.(\d+)\.(layernorm_\w+)\.", r"\1encoder.layer.\2.\3."),
    )
}


def table(model: ViT) -> Rules:
    """Returns the rules for the tensors of model.safetensors.

    Raises:
        UserError: if the model has no class token, which transformers does not support.
    """
    layouts.only(model, pool="token")
    return encoder("vit", model, rules.patches(model.patch, model.patch))


def encoder(name: str, model: ViT | ViViT, patches: Shape) -> Rules:
    """Returns the rules for a ViT, or a model like it, whose names begin with `name` in transformers."""
    return [
        *rules.linear(f"{name}.embeddings.patch_embeddings.projection", "patch", shape=patches),
        *rules.tensor(f"{name}.embeddings.cls_token", "token", rules.LEADING),
        *rules.tensor(f"{name}.embeddings.position_embeddings", "positions", rules.LEADING),
        *layouts.blocks(
            layouts.TRANSFORMERS, f"{name}.encoder.layer.{{i}}", "blocks", model.heads, range(model.depth)
        ),
        *rules.norm(f"{name}.layernorm", "norm"),
        *rules.linear("classifier", "head"),
    ]


def config(model: ViT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name."""
    height, width = side_lengths(model.resolution)
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": round(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": model.epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch,
        "num_channels": inputs["x"].shape[-1],
        **layouts.labels(model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the family does not have what a field states.
    """
    config = FIELDS.read(config)
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["patch_size"],
        "epsilon": config["layer_norm_eps"],
        "pool": "token",
    }


def source(model: ViT, tensors: Tensors, config: Mapping[str, Any] | None) -> ViT:
    """Returns the model at the resolution of config.json, or without it at that of the position table."""
    side = None if config is None else FIELDS.read(config)["image_size"]
    positions = tensors.get("vit.embeddings.position_embeddings")
    return layouts.with_resolution(model, positions, model.patch, stated=side)


def preprocessing(model: ViT) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("transformers' ViT", SYMMETRIC, square=True, resample="bilinear")


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    unused=UNUSED,
    base=BASE,
    renamed=RENAMED,
    source=source,
    preprocessing=preprocessing,
)
