"""VAE as diffusers' `AutoencoderKL`, the `vae` folder of a latent diffusion pipeline."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import foreign, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.rules import Rules
from scaling.errors import UserError
from scaling.models.vae import VAE

RENAMED = {
    "older diffusers": (
        (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    )
}

FIXED: dict[str, Any] = {  # fields of config.json, with the only value that the module supports
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
EPSILON = 1e-6  # epsilon of GroupNorm, which diffusers does not write down
FIELDS = foreign.Fields(
    "vae",
    compared={
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": None,
        "up_block_types": None,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,  # absent from the oldest files
    },
    only={"_class_name": "AutoencoderKL", **FIXED},
    free=foreign.DIFFUSERS | {"sample_size", "force_upcast"},  # for tiles; for half precision
)


def table(model: VAE) -> Rules:
    """Returns the rules for the tensors of diffusion_pytorch_model.safetensors."""
    levels = len(model.widths)
    table: Rules = [
        *rules.convolution("quant_conv", "quant"),
        *rules.convolution("post_quant_conv", "post_quant"),
    ]
    for side in ("encoder", "decoder"):
        table += rules.convolution(f"{side}.conv_in", f"{side}/conv_in")
        table += _middle(f"{side}.mid_block", f"{side}/middle")
        table += rules.norm(f"{side}.conv_norm_out", f"{side}/norm_out")
        table += rules.convolution(f"{side}.conv_out", f"{side}/conv_out")
    before = model.widths[0]
    for i, width in enumerate(model.widths):
        level = f"encoder.down_blocks.{i}"
        table += _level(level, f"encoder/level_{i}", model.blocks, before != width)
        if i < levels - 1:
            table += rules.convolution(f"{level}.downsamplers.0.conv", f"encoder/down_{i}")
        before = width
    for i, width in reversed(list(enumerate(model.widths))):
        level = f"decoder.up_blocks.{levels - 1 - i}"  # diffusers numbers them from the latent
        table += _level(level, f"decoder/level_{i}", model.blocks + 1, before != width)
        if i > 0:
            table += rules.convolution(f"{level}.upsamplers.0.conv", f"decoder/up_{i}")
        before = width
    return table


def _level(name: str, path: str, blocks: int, widens: bool) -> Rules:
    """Returns the rules for residual blocks, the first of which may change the width."""
    return [
        rule
        for i in range(blocks)
        for rule in _block(f"{name}.resnets.{i}", f"{path}/block_{i}", widens and i == 0)
    ]


def _block(name: str, path: str, widens: bool) -> Rules:
    return [
        *rules.norm(f"{name}.norm1", f"{path}/norm_1"),
        *rules.convolution(f"{name}.conv1", f"{path}/conv_1"),
        *rules.norm(f"{name}.norm2", f"{path}/norm_2"),
        *rules.convolution(f"{name}.conv2", f"{path}/conv_2"),
        *(rules.convolution(f"{name}.conv_shortcut", f"{path}/shortcut") if widens else []),
    ]


def _middle(name: str, path: str) -> Rules:
    attention = f"{name}.attentions.0"
    query, key, value, out = (f"{attention}.to_{n}" for n in ("q", "k", "v", "out.0"))
    return [
        *_block(f"{name}.resnets.0", f"{path}/block_0", widens=False),
        *rules.norm(f"{attention}.group_norm", f"{path}/attend/norm"),
        *rules.attention(query, key, value, out, f"{path}/attend/attention", heads=1),
        *_block(f"{name}.resnets.1", f"{path}/block_1", widens=False),
    ]


def config(model: VAE, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if the model's epsilon is not diffusers'.
    """
    if model.epsilon != EPSILON:
        raise UserError(f"epsilon={model.epsilon}: diffusers' AutoencoderKL has {EPSILON} and no other")
    levels = len(model.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": model.channels,
        "out_channels": model.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(model.widths),
        "layers_per_block": model.blocks,
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.groups,
        "sample_size": inputs["x"].shape[1],
        "scaling_factor": model.latent_scale,
        **FIXED,
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the autoencoder has another form.
    """
    config = FIELDS.read(config)
    levels = len(config["block_out_channels"])
    wanted = {
        "out_channels": config["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    foreign.require("vae", {key: value for key, value in config.items() if value is not None}, wanted)
    return {
        "widths": tuple(config["block_out_channels"]),
        "blocks": config["layers_per_block"],
        "groups": config["norm_num_groups"],
        "latent_channels": config["latent_channels"],
        "channels": config["in_channels"],
        "latent_scale": config["scaling_factor"],
        "epsilon": EPSILON,
    }


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    renamed=RENAMED,
)
