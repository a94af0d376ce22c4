"""U-Nets as diffusers' `UNet2DModel` (ADM) and `UNet2DConditionModel` (LDM).

diffusers' LDM takes not a class but the states that it attends to, `encoder_hidden_states` [B, M, K]. An
export has a linear layer on them, whose kernel is the label table and whose bias is 0, and so takes one-hot
labels [B, 1, num_classes + 1].
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scaling.convert import foreign, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.rules import ConversionRule, Rules, Shape
from scaling.errors import UserError
from scaling.models.unet import UNet

CLASSES = {"adm": "UNet2DModel", "ldm": "UNet2DConditionModel"}
# The names of stages without and with attention, in each direction.
STAGES = {
    "adm": {
        "down": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    },
    "ldm": {"down": ("DownBlock2D", "CrossAttnDownBlock2D"), "up": ("UpBlock2D", "CrossAttnUpBlock2D")},
}
# Fields of config.json, with the only value that the module supports.
FIXED: dict[str, dict[str, Any]] = {
    "adm": {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "mid_block_type": "UNetMidBlock2D",
        "time_embedding_type": "positional",
        "add_attention": True,
    },
    "ldm": {
        "resnet_time_scale_shift": "default",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "downsample_padding": 1,
        "encoder_hid_dim_type": "text_proj",
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "num_class_embeds": None,
    },
}
NONE_LDM: dict[str, Any] = {  # options of UNet2DConditionModel that no U-Net here has, turned off
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_type": "positional",
    **dict.fromkeys(("addition_embed_type", "addition_time_embed_dim", "time_cond_proj_dim")),
    **dict.fromkeys(("cross_attention_norm", "mid_block_only_cross_attention", "num_attention_heads")),
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act", "projection_class_embeddings_input_dim")),
    "reverse_transformer_layers_per_block": None,
}
COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_dim": None,
    "class_embed_type": None,
}

# Fields of config.json that describe the model, with the library's defaults.
COMPARED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [],
    "layers_per_block": 2,
    "down_block_types": [],
    "up_block_types": [],
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
}
FIELDS = {
    "adm": foreign.Fields(
        "unet",
        compared={**COMPARED, "attn_norm_num_groups": None, "num_class_embeds": None},
        only={"_class_name": CLASSES["adm"], **COMMON, **FIXED["adm"]},
        # The padding is unused where the samplers are residual.
        free=foreign.DIFFUSERS | {"sample_size", "downsample_padding", "num_train_timesteps"},
        otherwise={
            "resnet_time_scale_shift": "default",
            **dict.fromkeys(("downsample_type", "upsample_type"), "conv"),
        },
    ),
    "ldm": foreign.Fields(
        "unet",
        compared={**COMPARED, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280}
        | {"encoder_hid_dim": None},
        only={"_class_name": CLASSES["ldm"], **COMMON, **FIXED["ldm"], **NONE_LDM},
        free=foreign.DIFFUSERS | {"sample_size", "upcast_attention", "addition_embed_type_num_heads"},
        otherwise={"encoder_hid_dim_type": None},
    ),
}


def table(model: UNet) -> Rules:
    """Returns the rules for the tensors of diffusion_pytorch_model.safetensors.

    Raises:
        UserError: if diffusers has no such model.
    """
    _check(model)
    label: Rules
    if model.kind == "adm":
        label = rules.tensor("class_embedding.weight", "label/embedding")
    else:
        label = [
            *rules.tensor("encoder_hid_proj.weight", "label/embedding", rules.TRANSPOSED),
            ConversionRule("encoder_hid_proj.bias", (), _zero_bias(model.context)),
        ]
    return [
        *rules.convolution("conv_in", "input"),
        *rules.linear("time_embedding.linear_1", "time/up"),
        *rules.linear("time_embedding.linear_2", "time/down"),
        *label,
        *(rule for block in _down(model) for rule in block),
        *(rule for block in _up(model) for rule in block),
        *rules.norm("conv_norm_out", "norm"),
        *rules.convolution("conv_out", "output"),
    ]


def _check(model: UNet) -> None:
    if model.upsampler:
        raise UserError("upsampler=True: diffusers has no U-Net that resizes the image at low resolution")
    if model.kind == "adm" and model.heads:
        raise UserError(f"heads={model.heads}: diffusers' UNet2DModel has heads of one width in all stages")
    if model.multipliers[0] != 1:
        raise UserError(f"multipliers={model.multipliers}: diffusers' U-Nets begin with 1")


def _zero_bias(width: int) -> Shape:
    """Returns the conversion of a tensor [width] that has no place in the model, and must be 0."""

    def load(x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Checks the tensor, which has no place in the model.

        Raises:
            ValueError: if the shape is not [width].
            UserError: if a number is not 0.
        """
        if x.shape != (width,):
            raise ValueError(f"{x.shape}")
        if np.any(x):
            raise UserError("encoder_hid_proj.bias: must be 0; the family unet's label table has no bias")
        return ()

    return Shape(load, lambda: np.zeros(width, np.float32))


def _heads(model: UNet, stage: int) -> int:
    return model.stage_heads(stage) if 2**stage in model.attention else 0


def _down(model: UNet) -> Iterator[Rules]:
    """Yields the rules for the stages on the way down, and for the middle."""
    last, before = len(model.multipliers) - 1, 1
    for i, multiplier in enumerate(model.multipliers):
        stage = f"down_blocks.{i}"
        for j in range(model.depth):
            yield _block(model, stage, j, f"down_{i}_block_{j}", before != multiplier, _heads(model, i))
            before = multiplier
        if i < last:
            yield _sample(model, f"{stage}.downsamplers.0", f"down_{i}_sample")
    yield _block(model, "mid_block", 0, "middle_block_0", False, model.stage_heads(last))
    yield _block(model, "mid_block", 1, "middle_block_1", False, 0)


def _up(model: UNet) -> Iterator[Rules]:
    """Yields the rules for the stages on the way up, which diffusers numbers from the middle."""
    skips = [1]  # channels of the skip connections, in multiples of the width
    for i, multiplier in enumerate(model.multipliers):
        skips += [multiplier] * (model.depth + (i < len(model.multipliers) - 1))
    before = skips[-1]
    for i, multiplier in reversed(list(enumerate(model.multipliers))):
        stage = f"up_blocks.{len(model.multipliers) - 1 - i}"
        for j in range(model.depth + 1):
            widens = before + skips.pop() != multiplier
            yield _block(model, stage, j, f"up_{i}_block_{j}", widens, _heads(model, i))
            before = multiplier
        if i > 0:
            yield _sample(model, f"{stage}.upsamplers.0", f"up_{i}_sample")


def _block(model: UNet, stage: str, j: int, path: str, widens: bool, heads: int) -> Rules:
    table = _residual(f"{stage}.resnets.{j}", f"{path}/residual", widens)
    name = f"{stage}.attentions.{j}"
    if heads and model.kind == "adm":
        query, key, value, out = (f"{name}.to_{n}" for n in ("q", "k", "v", "out.0"))
        table += rules.norm(f"{name}.group_norm", f"{path}/norm_attention")
        table += rules.attention(query, key, value, out, f"{path}/attention", heads)
    elif heads:
        table += _transformer(name, f"{path}/transformer", heads)
    return table


def _residual(name: str, path: str, widens: bool) -> Rules:
    return [
        *rules.norm(f"{name}.norm1", f"{path}/norm_in"),
        *rules.convolution(f"{name}.conv1", f"{path}/conv_in"),
        *rules.linear(f"{name}.time_emb_proj", f"{path}/condition"),
        *rules.norm(f"{name}.norm2", f"{path}/norm_out"),
        *rules.convolution(f"{name}.conv2", f"{path}/conv_out"),
        *(rules.convolution(f"{name}.conv_shortcut", f"{path}/skip") if widens else []),
    ]


def _transformer(name: str, path: str, heads: int) -> Rules:
    block = f"{name}.transformer_blocks.0"
    table = [
        *rules.norm(f"{name}.norm", f"{path}/norm"),
        *rules.convolution(f"{name}.proj_in", f"{path}/proj_in"),
        *rules.gated(f"{block}.ff.net.0.proj", f"{path}/mlp"),
        *rules.linear(f"{block}.ff.net.2", f"{path}/mlp/down"),
        *rules.norm(f"{block}.norm3", f"{path}/norm_mlp"),
        *rules.convolution(f"{name}.proj_out", f"{path}/proj_out"),
    ]
    for i, part in ((1, "attention"), (2, "cross_attention")):
        query, key, value, out = (f"{block}.attn{i}.to_{n}" for n in ("q", "k", "v", "out.0"))
        table += rules.norm(f"{block}.norm{i}", f"{path}/norm_{part}")
        table += rules.attention(query, key, value, out, f"{path}/{part}", heads, bias=False)
        table += rules.tensor(f"{out}.bias", f"{path}/{part}/out/bias")
    return table


def _sample(model: UNet, name: str, path: str) -> Rules:
    if model.kind == "adm":
        return _residual(name, f"{path}/residual", False)
    return rules.convolution(f"{name}.conv", path)


def config(model: UNet, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name.

    Raises:
        UserError: if diffusers has no such model.
    """
    _check(model)
    _, side, _, channels = inputs["x"].shape
    attends = [2**i in model.attention for i in range(len(model.multipliers))]
    widths = [model.width * multiplier for multiplier in model.multipliers]
    names = STAGES[model.kind]
    written = {
        "_class_name": CLASSES[model.kind],
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels * (2 if model.learn_sigma else 1),
        "block_out_channels": widths,
        "layers_per_block": model.depth,
        "down_block_types": [names["down"][each] for each in attends],
        "up_block_types": [names["up"][each] for each in reversed(attends)],
        "norm_num_groups": model.groups,
        "norm_eps": model.epsilon,
        **COMMON,
        **FIXED[model.kind],
    }
    if model.kind == "adm":
        written["attention_head_dim"] = model.head_width
        written["attn_norm_num_groups"] = model.groups
        written["num_class_embeds"] = model.num_classes + 1
    else:  # diffusers reads the number of heads from attention_head_dim
        written["attention_head_dim"] = model.heads or [max(1, width // model.head_width) for width in widths]
        written["cross_attention_dim"] = model.context
        written["encoder_hid_dim"] = model.num_classes + 1
    return written


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the U-Net has another form.
    """
    kind = next((k for k, name in CLASSES.items() if name == config["_class_name"]), None)
    if kind is None:
        raise UserError(f"_class_name={config['_class_name']!r}: must be {' or '.join(CLASSES.values())}")
    config = FIELDS[kind].read(config)
    widths, names, groups = config["block_out_channels"], STAGES[kind], config["norm_num_groups"]
    attends = [name == names["down"][1] for name in config["down_block_types"]]
    wanted: dict[str, Any] = {
        "down_block_types": [names["down"][each] for each in attends],
        "up_block_types": [names["up"][each] for each in reversed(attends)],
    }
    if kind == "adm":
        wanted["attn_norm_num_groups"] = groups
    foreign.require("unet", config, wanted)
    channels, out = config["in_channels"], config["out_channels"]
    if out not in (channels, 2 * channels):
        raise UserError(f"out_channels={out}: must be in_channels={channels}, or twice that with a variance")
    classes = config["num_class_embeds" if kind == "adm" else "encoder_hid_dim"]
    if classes is None:
        raise UserError("num_class_embeds=None: the family unet has class-conditional models only")
    stated = {
        "kind": kind,
        "width": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "depth": config["layers_per_block"],
        "attention": tuple(2**i for i, each in enumerate(attends) if each),
        "groups": groups,
        "num_classes": classes - 1,
        "learn_sigma": out == 2 * channels,
        "epsilon": config["norm_eps"],
    }
    heads = config["attention_head_dim"]
    if kind == "adm":
        return stated | {"heads": 0, "head_width": heads}
    stated["context"] = config["cross_attention_dim"]
    if isinstance(heads, int):
        return stated | {"heads": heads}
    return stated | {"heads": 0, "head_width": widths[-1] // heads[-1]}


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
)
