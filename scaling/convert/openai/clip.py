"""CLIP as in OpenAI's repository: a state dict, with the ViT or the modified ResNet for images.

The released files are TorchScript archives, which hold programs: save `torch.jit.load(FILE).state_dict()`
first.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts, rules
from scaling.convert.converter import Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.clip import CLIP
from scaling.models.clip_resnet import STRIDE
from scaling.preprocessing import OPENAI

# The released archives hold these three numbers as tensors, which OpenAI's loader drops.
IGNORED = (*layouts.COUNTERS, "^(input_resolution|context_length|vocab_size)$")
BLOCK_NAMES = layouts.BlockNames(
    "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj", norms=("ln_1", "ln_2")
)
HEAD = 64  # channels per head, from which OpenAI's loader infers the number of heads


def table(model: CLIP) -> Rules:
    """Returns the rules for the tensors of a state dict, except counters.

    Raises:
        UserError: if OpenAI's code does not have the model.
    """
    _check(model)
    block, layers = "transformer.resblocks.{i}", range(model.text_depth)
    return [
        *(_resnet(model) if model.patch is None else _vit(model, model.patch)),
        *rules.tensor("token_embedding.weight", "text/tokens/embedding"),
        *rules.tensor("positional_embedding", "text/positions"),
        *layouts.blocks(BLOCK_NAMES, block, "text/blocks", model.text_heads, layers),
        *rules.norm("ln_final", "text/norm"),
        *rules.tensor("text_projection", "text_projection/kernel"),
        *rules.tensor("logit_scale", "logit_scale"),
    ]


def _check(model: CLIP) -> None:
    for name, width in (("heads", "width"), ("text_heads", "text_width")):
        heads, channels = getattr(model, name), getattr(model, width)
        if heads * HEAD != channels:
            raise UserError(f"model.{name}={heads}: must be {width} / {HEAD}, which is {channels / HEAD:g}")
    layouts.only(model, mlp_ratio=4.0, activation="quick_gelu", epsilon=1e-5, pre_norm=True)


def _vit(model: CLIP, patch: int) -> Rules:
    if not isinstance(model.depth, int):
        raise UserError(f"model.depth={model.depth}: must be one number for a ViT")
    block, layers = "visual.transformer.resblocks.{i}", range(model.depth)
    return [
        *rules.tensor("visual.class_embedding", "image/token", rules.reshaped((-1,), (1, -1))),
        *rules.tensor("visual.positional_embedding", "image/positions"),
        *rules.linear("visual.conv1", "image/patch", bias=False, shape=rules.patches(patch, patch)),
        *rules.norm("visual.ln_pre", "image/norm_pre"),
        *layouts.blocks(BLOCK_NAMES, block, "image/blocks", model.heads, layers),
        *rules.norm("visual.ln_post", "image/norm"),
        *rules.tensor("visual.proj", "image/projection/kernel"),
    ]


def _resnet(model: CLIP) -> Rules:
    if isinstance(model.depth, int):
        raise UserError(f"model.depth={model.depth}: must be four numbers for a modified ResNet")
    table: Rules = []
    for i in (1, 2, 3):
        table += layouts.normed_convolution(
            f"visual.conv{i}", f"visual.bn{i}", f"image/stem{i}", f"image/norm_stem{i}"
        )
    table += layouts.resnet_stages(model.depth, True, layouts.TORCHVISION, "visual.", "image/")
    pool = "visual.attnpool"
    query, key, value, out = (f"{pool}.{name}_proj" for name in "qkvc")
    table += rules.tensor(f"{pool}.positional_embedding", "image/pool/positions")
    return table + rules.attention(query, key, value, out, "image/pool/attention", model.heads)


def source(model: CLIP, tensors: Tensors, config: Mapping[str, Any] | None) -> CLIP:
    """Returns the model at the resolution of the file's position table."""
    if model.patch is None:
        return layouts.with_resolution(model, tensors.get("visual.attnpool.positional_embedding"), STRIDE)
    return layouts.with_resolution(model, tensors.get("visual.positional_embedding"), model.patch)


def buffers(model: CLIP, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the counters of the modified ResNet."""
    return layouts.counters(table(model))


def preprocessing(model: CLIP) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("CLIP", OPENAI, short=1.0)


CONVERTER = Converter(
    table=table,
    ignored=IGNORED,
    source=source,
    buffers=buffers,
    preprocessing=preprocessing,
)
