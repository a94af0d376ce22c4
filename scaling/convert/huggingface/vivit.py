"""ViViT as transformers' `VivitForVideoClassification`: model 1, with joint attention."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.huggingface import vit
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.variants import side_lengths
from scaling.models.vivit import ViViT
from scaling.preprocessing import SYMMETRIC

# transformers' name -> ours; the first is transformers' default.
ACTIVATION_NAMES = {"gelu_fast": "gelu_tanh", "gelu": "gelu"}

FIELDS = foreign.transformers(
    "vivit",
    compared={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu_fast",
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "num_frames": 32,
        "tubelet_size": [2, 16, 16],
    },
    only={"model_type": "vivit", "qkv_bias": True},
    free="hidden_dropout_prob attention_probs_dropout_prob"
    " num_channels"  # the patch kernel's shape has them
    " pooler_act pooler_output_size",  # fields of the model without a head
)
BASE = "vivit."
RENAMED = vit.RENAMED
UNUSED = (r"^(vivit\.)?pooler\.",)  # a part of the model without a head


def table(model: ViViT) -> Rules:
    """Returns the rules for the tensors of model.safetensors.

    Raises:
        UserError: if transformers does not have the model.
    """
    check(model)
    return vit.encoder("vivit", model, rules.patches(model.tubelet, model.patch, model.patch))


def source(model: ViViT, tensors: Tensors, config: Mapping[str, Any] | None) -> ViViT:
    """Returns the model with the frames and the resolution of config.json.

    Without config.json they must be the model's own, as the position table does not tell them.
    """
    if config is None:
        return model
    config = FIELDS.read(config)
    side = config["image_size"]
    stated = model.clone(
        frames=config["num_frames"], resolution=side if isinstance(side, int) else tuple(side)
    )
    return model if stated.grid() == model.grid() else stated


def check(model: ViViT) -> None:
    """Checks that transformers has the model.

    Raises:
        UserError: if transformers does not have it.
    """
    layouts.only(model, attention="joint")
    if model.embedding == "frame" and model.tubelet > 1:
        raise UserError(f"model.embedding={model.embedding}: must be tubelet, the only one in this format")


def config(model: ViViT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if transformers does not have the model.
    """
    check(model)
    height, width = side_lengths(model.resolution)
    activation = next(name for name, native in ACTIVATION_NAMES.items() if native == model.activation)
    return {
        "architectures": ["VivitForVideoClassification"],
        "model_type": "vivit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": round(model.width * model.mlp_ratio),
        "hidden_act": activation,
        "layer_norm_eps": model.epsilon,
        "num_frames": model.frames,
        "image_size": height if height == width else [height, width],
        "tubelet_size": [model.tubelet, model.patch, model.patch],
        "num_channels": inputs["x"].shape[-1],
        "qkv_bias": True,
        **layouts.labels(model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the model does not have the activation, or the family what another field states.
    """
    config = FIELDS.read(config)
    activation = config["hidden_act"]
    if activation not in ACTIVATION_NAMES:
        raise UserError(f"hidden_act={activation!r}: must be one of {', '.join(ACTIVATION_NAMES)}")
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "patch": config["tubelet_size"][1],
        "tubelet": config["tubelet_size"][0],
        "activation": ACTIVATION_NAMES[activation],
        "epsilon": config["layer_norm_eps"],
        "attention": "joint",
    }


def preprocessing(model: ViViT) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("ViViT", SYMMETRIC, short=0.875, resample="bilinear")


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    unused=UNUSED,
    base=BASE,
    renamed=RENAMED,
    source=source,
    preprocessing=preprocessing,
)
