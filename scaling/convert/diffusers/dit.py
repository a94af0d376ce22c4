"""DiT as diffusers' `DiTTransformer2DModel`, the `transformer` folder of a DiT pipeline."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.rules import ConversionRule, Rules
from scaling.errors import UserError
from scaling.models.dit import DiT

BLOCK_NAMES = layouts.BlockNames(
    qkv=("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    out="attn1.to_out.0",
    up="ff.net.0.proj",
    down="ff.net.2",
)

FIELDS = foreign.Fields(
    "dit",
    compared={
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_layers": 28,
        "in_channels": 4,
        "out_channels": None,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_eps": 1e-5,
    },
    only={
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "attention_bias": True,
        # Fields of the library's older class, which served other models too.
        "attention_type": "default",
        **dict.fromkeys(("only_cross_attention", "double_self_attention"), False),
        **dict.fromkeys(
            ("cross_attention_dim", "num_vector_embeds", "caption_channels", "interpolation_scale")
        ),
    },
    # Unused with patches, or used only in training or for arithmetic in half precision.
    free=foreign.DIFFUSERS
    | {"norm_num_groups", "upcast_attention", "use_linear_projection", "use_additional_conditions"},
)
# Fields of a model that its files decide where a config leaves them open.
SETS = ("frequency_shift", "mlp_epsilon")
# The class in the files to which the authors' weights were converted. With them, diffusers itself computes
# other outputs than the authors' code.
OLDER = "Transformer2DModel"


def table(model: DiT) -> Rules:
    """Returns the rules for the tensors of diffusion_pytorch_model.safetensors.

    Raises:
        UserError: if diffusers does not have the model.
    """
    layouts.only(model, block="adaln-zero", qk_norm=False, mlp_ratio=4.0)
    block, layers = "transformer_blocks.{i}", range(model.depth)
    return [
        *rules.linear("pos_embed.proj", "patch", shape=rules.patches(model.patch, model.patch)),
        *_embedders(model.depth),
        *rules.linear(f"{block}.norm1.linear", "blocks/modulation", layers),
        *layouts.blocks(BLOCK_NAMES, block, "blocks", model.heads, layers),
        *rules.linear("proj_out_1", "final/modulation"),
        *rules.linear("proj_out_2", "final/linear"),
    ]


def _embedders(depth: int) -> Rules:
    """Returns the rules for the embedders of time and label: one each in DiT, one per block in diffusers."""
    name = "transformer_blocks.{i}.norm1.emb"
    first: Rules = [
        *rules.linear(f"{name}.timestep_embedder.linear_1", "time/up"),
        *rules.linear(f"{name}.timestep_embedder.linear_2", "time/down"),
        *rules.tensor(f"{name}.class_embedder.embedding_table.weight", "label/embedding"),
    ]
    return [
        ConversionRule(
            r.name.format(i=0), r.paths, r.shape, copies=tuple(r.name.format(i=i) for i in range(1, depth))
        )
        for r in first
    ]


def check_export(model: DiT) -> None:
    """Checks that diffusers has the model's frequencies; it does not have the authors'.

    Raises:
        UserError: if the frequencies are not diffusers'.
    """
    if model.frequency_shift != 1:
        raise UserError(
            f"model.frequency_shift={model.frequency_shift}: diffusers' DiT has 1, with which these weights "
            "would give other outputs; export them as facebookresearch"
        )


def config(model: DiT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if the inputs are not square.
    """
    _, side, width, channels = inputs["x"].shape
    if side != width:
        raise UserError(f"resolution: must be square for this format; the input has {side}x{width} pixels")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "num_layers": model.depth,
        "in_channels": channels,
        "out_channels": channels * (2 if model.learn_sigma else 1),
        "sample_size": side,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.num_classes,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": model.mlp_epsilon,
        "attention_bias": True,
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the family does not have what a field states.
    """
    config = FIELDS.read(config)
    if config["_class_name"] not in (OLDER, FIELDS.compared["_class_name"]):
        raise UserError(f"_class_name={config['_class_name']!r}: must be {FIELDS.compared['_class_name']}")
    channels, out = config["in_channels"], config["out_channels"]
    if out not in (None, channels, 2 * channels):
        raise UserError(f"out_channels={out}: must be in_channels={channels}, or twice that with a variance")
    from_authors = config["_class_name"] == OLDER
    return {
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "patch": config["patch_size"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out == 2 * channels,
        "block": "adaln-zero",
        "frequency_shift": 0 if from_authors else 1,
        "mlp_epsilon": 1e-6 if from_authors else config["norm_eps"],
    }


def notes(config: Mapping[str, Any]) -> list[str]:
    """Returns the lines to report about a folder's config.json."""
    if config.get("_class_name") != OLDER:
        return []
    return [
        f"_class_name={OLDER}: is taken for the authors' converted weights, whose frequencies and epsilon "
        "are not diffusers'; for weights that diffusers trained give --config.model.frequency_shift=1 and "
        "--config.model.mlp_epsilon=1e-5"
    ]


def check_inputs(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Checks that the inputs have the side to which diffusers' positions refer.

    Raises:
        UserError: if they have another side.
    """
    side, image_sides = FIELDS.read(config)["sample_size"], inputs["x"].shape[1:3]
    if image_sides != (side, side):
        raise UserError(
            f"sample_size={side}: the run's images are {image_sides[0]}x{image_sides[1]}, for which "
            f"diffusers would stretch the positions; give data of {side}x{side}"
        )


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields, sets=SETS, notes=notes, check_inputs=check_inputs),
    check_export=check_export,
)
