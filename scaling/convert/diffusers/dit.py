"""DiT as diffusers' `DiTTransformer2DModel`, the `transformer` folder of a DiT pipeline."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, layouts, rules
from scaling.convert.rules import Rule, Rules
from scaling.errors import UserError
from scaling.models.dit import DiT

BLOCK = layouts.BlockNames(
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
        # Of its older form, which served other models, too.
        "attention_type": "default",
        **dict.fromkeys(("only_cross_attention", "double_self_attention"), False),
        **dict.fromkeys(
            ("cross_attention_dim", "num_vector_embeds", "caption_channels", "interpolation_scale")
        ),
    },
    # Nothing reads these with patches, or they are of training, or of arithmetic in half precision.
    free=foreign.DIFFUSERS
    | {"norm_num_groups", "upcast_attention", "use_linear_projection", "use_additional_conditions"},
)
# Those of a model that its files decide where a config leaves them open.
SETS = ("frequency_shift", "mlp_epsilon")
# The class of the files that the authors' weights were converted to, with which diffusers itself gives other
# outputs than the authors' code.
OLDER = "Transformer2DModel"


def table(model: DiT) -> Rules:
    """The tensors of diffusion_pytorch_model.safetensors.

    Raises: UserError for a model that diffusers does not have.
    """
    layouts.only(model, block="adaln-zero", qk_norm=False, mlp_ratio=4.0)
    block, layers = "transformer_blocks.{i}", range(model.depth)
    return [
        *rules.linear("pos_embed.proj", "patch", shape=rules.patches(model.patch, model.patch)),
        *_embedders(model.depth),
        *rules.linear(f"{block}.norm1.linear", "blocks/modulation", layers),
        *layouts.blocks(BLOCK, block, "blocks", model.heads, layers),
        *rules.linear("proj_out_1", "final/modulation"),
        *rules.linear("proj_out_2", "final/linear"),
    ]


def _embedders(depth: int) -> Rules:
    """Of time and label: DiT has one of each, and diffusers the same in every block."""
    name = "transformer_blocks.{i}.norm1.emb"
    first: Rules = [
        *rules.linear(f"{name}.timestep_embedder.linear_1", "time/up"),
        *rules.linear(f"{name}.timestep_embedder.linear_2", "time/down"),
        *rules.tensor(f"{name}.class_embedder.embedding_table.weight", "label/embedding"),
    ]
    return [
        Rule(
            r.theirs.format(i=0), r.ours, r.shape, copies=tuple(r.theirs.format(i=i) for i in range(1, depth))
        )
        for r in first
    ]


def check_export(model: DiT) -> None:
    """Raises UserError for a model of the authors' frequencies, which diffusers does not have."""
    if model.frequency_shift != 1:
        raise UserError(
            f"model.frequency_shift={model.frequency_shift}: diffusers' DiT has 1, with which these weights "
            "would give other outputs; export them as facebookresearch"
        )


def config(model: DiT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises: UserError for inputs that are not square.
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
    """Returns what a folder's config.json says of the model, in the names of its fields.

    Raises: UserError for what the family does not have.
    """
    config = FIELDS.read(config)
    if config["_class_name"] not in (OLDER, FIELDS.compared["_class_name"]):
        raise UserError(f"_class_name={config['_class_name']!r}: must be {FIELDS.compared['_class_name']}")
    channels, out = config["in_channels"], config["out_channels"]
    if out not in (None, channels, 2 * channels):
        raise UserError(f"out_channels={out}: must be in_channels={channels}, or twice that with a variance")
    theirs = config["_class_name"] == OLDER
    return {
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "patch": config["patch_size"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out == 2 * channels,
        "block": "adaln-zero",
        "frequency_shift": 0 if theirs else 1,
        "mlp_epsilon": 1e-6 if theirs else config["norm_eps"],
    }


def notes(config: Mapping[str, Any]) -> list[str]:
    """Returns what is to be said of a folder's config.json."""
    if config.get("_class_name") != OLDER:
        return []
    return [
        f"_class_name={OLDER}: is taken for the authors' converted weights, whose frequencies and epsilon "
        "are not diffusers'; for weights that diffusers trained give --config.model.frequency_shift=1 and "
        "--config.model.mlp_epsilon=1e-5"
    ]


def check_inputs(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Raises UserError for inputs of another side than the one that diffusers' positions count from."""
    side, given = FIELDS.read(config)["sample_size"], inputs["x"].shape[1:3]
    if given != (side, side):
        raise UserError(
            f"sample_size={side}: the run's images are {given[0]}x{given[1]}, for which diffusers would "
            f"stretch the positions; give data of {side}x{side}"
        )
