"""ViT as timm's `VisionTransformer`.

`pool="mean"` is timm's model with `class_token=False, global_pool="avg", fc_norm=False`.
"""

from collections.abc import Mapping
from typing import Any

from scaling.convert import layouts, rules
from scaling.convert.converter import Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError
from scaling.models.vit import ViT
from scaling.preprocessing import SYMMETRIC


def table(model: ViT) -> Rules:
    """Returns the rules for the tensors of a state dict."""
    token = rules.tensor("cls_token", "token", rules.LEADING) if model.pool == "token" else []
    return [
        *token,
        *rules.tensor("pos_embed", "positions", rules.LEADING),
        *rules.linear("patch_embed.proj", "patch", shape=rules.patches(model.patch, model.patch)),
        *layouts.blocks(layouts.TIMM, "blocks.{i}", "blocks", model.heads, range(model.depth)),
        *rules.norm("norm", "norm"),
        *rules.linear("head", "head"),
    ]


def source(model: ViT, tensors: Tensors, config: Mapping[str, Any] | None) -> ViT:
    """Returns the model at the resolution of the file's position table, taken to be square.

    Raises:
        UserError: if the file's last norm comes after the mean over patches.
    """
    if "fc_norm.weight" in tensors:
        raise UserError(
            "fc_norm.weight: the file is of a ViT that averages before its last norm; the family vit "
            "averages after it (timm's fc_norm=False)"
        )
    extra = 1 if model.pool == "token" else 0
    return layouts.with_resolution(model, tensors.get("pos_embed"), model.patch, extra)


def preprocessing(model: ViT) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("timm's ViT", SYMMETRIC, short=0.9)


CONVERTER = Converter(
    table=table,
    source=source,
    preprocessing=preprocessing,
)
