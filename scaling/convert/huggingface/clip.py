"""CLIP as transformers' `CLIPModel`, whose image tower is a ViT."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.clip import CLIP
from scaling.preprocessing import OPENAI

IGNORED = (r"\.position_ids$",)  # 0, 1, 2, ...: older folders hold them
ACTIVATION_NAMES = ("quick_gelu", "gelu")  # the same names in both libraries
BLOCK_NAMES = layouts.BlockNames(
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
)
# As the end of text, transformers reads 2 as "the greatest token id"; OpenAI's own folders state it so.
GREATEST_ID = 2

FIELDS = foreign.transformers(
    "clip",
    compared={
        "projection_dim": 512,
        **dict.fromkeys(("vision_config", "text_config", "vision_config_dict", "text_config_dict")),
    },
    only={"model_type": "clip"},
    free="logit_scale_init_value",
)
TOWERS = {
    "vision_config": foreign.transformers(
        "clip",
        compared={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        free="model_type attention_dropout dropout projection_dim num_channels",
    ),
    "text_config": foreign.transformers(
        "clip",
        compared={
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        free="model_type attention_dropout dropout projection_dim",
    ),
}


def table(model: CLIP) -> Rules:
    """Returns the rules for the tensors of model.safetensors.

    Raises:
        UserError: if the image tower is the modified ResNet or a plain ViT, which transformers does not have.
    """
    patch, depth = model.patch, model.depth
    if patch is None or not isinstance(depth, int):
        raise UserError("patch=None: transformers has no CLIP with a ResNet; its image tower must be a ViT")
    layouts.only(model, pre_norm=True)
    vision, text, block = "vision_model", "text_model", "encoder.layers.{i}"
    return [
        *rules.tensor(f"{vision}.embeddings.class_embedding", "image/token", rules.reshaped((-1,), (1, -1))),
        *rules.linear(
            f"{vision}.embeddings.patch_embedding",
            "image/patch",
            bias=False,
            shape=rules.patches(patch, patch),
        ),
        *rules.tensor(f"{vision}.embeddings.position_embedding.weight", "image/positions"),
        *rules.norm(f"{vision}.pre_layrnorm", "image/norm_pre"),
        *layouts.blocks(BLOCK_NAMES, f"{vision}.{block}", "image/blocks", model.heads, range(depth)),
        *rules.norm(f"{vision}.post_layernorm", "image/norm"),
        *rules.linear("visual_projection", "image/projection", bias=False),
        *rules.tensor(f"{text}.embeddings.token_embedding.weight", "text/tokens/embedding"),
        *rules.tensor(f"{text}.embeddings.position_embedding.weight", "text/positions"),
        *layouts.blocks(
            BLOCK_NAMES, f"{text}.{block}", "text/blocks", model.text_heads, range(model.text_depth)
        ),
        *rules.norm(f"{text}.final_layer_norm", "text/norm"),
        *rules.linear("text_projection", "text_projection", bias=False),
        *rules.tensor("logit_scale", "logit_scale"),
    ]


def source(model: CLIP, tensors: Tensors, config: Mapping[str, Any] | None) -> CLIP:
    """Returns the model at the resolution of the file's position table."""
    if model.patch is None:
        return model  # a model that `table` refuses
    positions = tensors.get("vision_model.embeddings.position_embedding.weight")
    return layouts.with_resolution(model, positions, model.patch)


def config(model: CLIP, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name."""
    common = {
        "hidden_act": model.activation,
        "layer_norm_eps": model.epsilon,
        "projection_dim": model.embed_dim,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.heads,
            "intermediate_size": round(model.width * model.mlp_ratio),
            "image_size": model.resolution,
            "patch_size": model.patch,
            "num_channels": inputs["x"].shape[-1],
            **common,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": model.text_width,
            "num_hidden_layers": model.text_depth,
            "num_attention_heads": model.text_heads,
            "intermediate_size": round(model.text_width * model.mlp_ratio),
            "vocab_size": model.vocabulary,
            "max_position_embeddings": model.context,
            "eos_token_id": GREATEST_ID,
            **common,
        },
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    A `text_config_dict` or `vision_config_dict`, which early folders have, takes precedence over the section
    without `_dict`, and so do its defaults.

    Raises:
        UserError: if the towers differ in what is one field here, the activation is another, the end of text
            is not the greatest id, or the family does not have what a field states.
    """
    config = FIELDS.read(config)
    vision, text = (_tower(config, name) for name in TOWERS)
    vision["mlp_ratio"], text["mlp_ratio"] = (
        t["intermediate_size"] / t["hidden_size"] for t in (vision, text)
    )
    for name in ("hidden_act", "layer_norm_eps", "mlp_ratio"):
        if vision[name] != text[name]:
            raise UserError(f"{name}: {vision[name]} for images and {text[name]} for texts; must be the same")
    if vision["hidden_act"] not in ACTIVATION_NAMES:
        raise UserError(f"hidden_act={vision['hidden_act']}: must be one of {', '.join(ACTIVATION_NAMES)}")
    if text["eos_token_id"] not in (GREATEST_ID, text["vocab_size"] - 1):
        raise UserError(
            f"text_config.eos_token_id={text['eos_token_id']}: must be {GREATEST_ID} or the greatest id, "
            f"{text['vocab_size'] - 1}; only there does the family clip read a text's features"
        )
    return {
        "patch": vision["patch_size"],
        "width": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_ratio": vision["mlp_ratio"],
        "resolution": vision["image_size"],
        "embed_dim": config["projection_dim"],
        "text_width": text["hidden_size"],
        "text_depth": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "vocabulary": text["vocab_size"],
        "context": text["max_position_embeddings"],
        "activation": vision["hidden_act"],
        "epsilon": vision["layer_norm_eps"],
    }


def _tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    tower, stated, early = TOWERS[name], config[name] or {}, config[f"{name}_dict"]
    if early is not None:
        stated = {**stated, **tower.only, **tower.compared, **early}
    return tower.read(stated, name)


def preprocessing(model: CLIP) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("CLIP", OPENAI, short=1.0)


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    ignored=IGNORED,
    source=source,
    preprocessing=preprocessing,
)
