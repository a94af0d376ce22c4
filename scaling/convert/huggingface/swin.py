"""Swin as transformers' `SwinForImageClassification`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.models.variants import side_lengths
from scaling.preprocessing import IMAGENET

IGNORED = (r"relative_position_index$",)  # computed from the window; files of older versions hold it
FIXED = {  # fields that transformers lets a config choose and `Swin` does not
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,  # transformers applies another value to the blocks alone
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}
FIELDS = foreign.transformers(
    "swin",
    compared={
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "patch_size": 4,
    },
    only={"model_type": "swin", **FIXED},
    free="hidden_dropout_prob attention_probs_dropout_prob drop_path_rate num_channels"
    " image_size encoder_stride path_norm"  # unused without absolute positions and a decoder
    " hidden_size num_layers out_features out_indices stage_names",  # determined by the others
)
BASE = "swin."
RENAMED = {
    "transformers 5": (
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.(relative_position_\w+)$", r".attention.self.\1"),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
}

NAMES = layouts.SwinNames(
    patch="swin.embeddings.patch_embeddings.projection",
    norm_patch="swin.embeddings.norm",
    norm="swin.layernorm",
    head="classifier",
    stage="swin.encoder.layers.{stage}",
    block=dataclasses.replace(
        layouts.TRANSFORMERS,
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    ),
    bias="attention.self.relative_position_bias_table",
)


def source(model: Swin, tensors: Tensors, config: Mapping[str, Any] | None) -> Swin:
    """Returns the model with the window of the tensors' bias tables."""
    return layouts.with_window(model, tensors, NAMES)


def table(model: Swin) -> Rules:
    """Returns the rules for the tensors of model.safetensors."""
    return layouts.swin(model, NAMES)


def config(model: Swin, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if transformers would give the epsilon to some norms only.
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
        **layouts.labels(model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if `Swin` does not have what a field states.
    """
    config = FIELDS.read(config)
    return {
        "width": config["embed_dim"],
        "depths": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window_size"],
        "mlp_ratio": config["mlp_ratio"],
        "patch": config["patch_size"],
        "epsilon": FIXED["layer_norm_eps"],
    }


def preprocessing(model: Swin) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("transformers' Swin", IMAGENET, square=True)


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    ignored=IGNORED,
    base=BASE,
    renamed=RENAMED,
    source=source,
    preprocessing=preprocessing,
)
