"""ViT as transformers' `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import layouts, rules
from scaling.convert.rules import Rules, Shape, Tensors
from scaling.models.variants import side_lengths
from scaling.models.vit import ViT
from scaling.models.vivit import ViViT


def table(model: ViT) -> Rules:
    """The tensors of model.safetensors.

    Raises: UserError for a model without a class token, which transformers does not have.
    """
    layouts.only(model, pool="token")
    return encoder("vit", model, rules.patches(model.patch, model.patch))


def encoder(name: str, model: ViT | ViViT, patches: Shape) -> Rules:
    """The tensors of a ViT, or of a model like it, of transformers' name `name`."""
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
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name."""
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


def source(model: ViT, tensors: Tensors, config: Mapping[str, Any] | None) -> ViT:
    """The model for the resolution that the file's position table is for, taken to be square."""
    return layouts.with_resolution(model, tensors.get("vit.embeddings.position_embeddings"), model.patch)
