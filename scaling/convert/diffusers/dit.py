"""DiT as diffusers' `DiTTransformer2DModel`, the `transformer` folder of a DiT pipeline."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import layouts, rules
from scaling.convert.rules import Rule, Rules
from scaling.models.dit import DiT

BLOCK = layouts.BlockNames(
    qkv=("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    out="attn1.to_out.0",
    up="ff.net.0.proj",
    down="ff.net.2",
)


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


def config(model: DiT, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name."""
    _, side, _, channels = inputs["x"].shape
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
        "norm_eps": 1e-6,
        "attention_bias": True,
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says of the model, in the names of its fields."""
    return {
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "patch": config["patch_size"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
        "block": "adaln-zero",
    }
