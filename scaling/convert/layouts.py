"""Parts that the files of several formats share, with each format's names as data.

These are the requirements on a model, the blocks of transformers, and the stages of Swin and of ResNet.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import numpy as np

from scaling.convert import rules
from scaling.convert.rules import Layers, Rules, Tensors
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.models.variants import side_lengths

M = TypeVar("M", bound=nn.Module)


# Requirements


def only(model: nn.Module, **values: Any) -> None:
    """Checks that the model's fields have these values, the only ones of a format.

    Raises:
        UserError: if a field has another value.
    """
    for name, value in values.items():
        if getattr(model, name) != value:
            raise UserError(
                f"model.{name}={getattr(model, name)}: must be {value}, the only one in this format"
            )


def labels(count: int) -> dict[str, Any]:
    """Returns the fields of config.json from which transformers reads the number of classes."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(count)},
        "label2id": {f"LABEL_{i}": i for i in range(count)},
    }


# Blocks of transformers


@dataclass(frozen=True)
class BlockNames:
    """The names of a transformer block's parts: attention and an MLP, with a norm before each.

    `qkv` names three linear layers; for one layer that holds all three, it is the prefix of its "weight" and
    "bias".
    """

    qkv: tuple[str, str, str] | str
    out: str
    up: str
    down: str
    norms: tuple[str, str] | None = None  # None for norms without parameters


TRANSFORMERS = BlockNames(  # the names of Hugging Face's ViT and of most models that came after it
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
TIMM = BlockNames("attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2", norms=("norm1", "norm2"))


def blocks(names: BlockNames, block: str, path: str, heads: int, layers: Layers) -> Rules:
    """Returns the rules for a stack of blocks; `block` is the name of one, with "{i}" for its number."""
    layers = None if layers is None else tuple(layers)
    out = f"{block}.{names.out}"
    if isinstance(names.qkv, str):
        weight, bias = (f"{block}.{names.qkv}{part}" for part in ("weight", "bias"))
        table = rules.fused_attention(weight, bias, out, f"{path}/attention", heads, layers)
    else:
        query, key, value = (f"{block}.{name}" for name in names.qkv)
        table = rules.attention(query, key, value, out, f"{path}/attention", heads, layers)
    if names.norms is not None:
        table += rules.norm(f"{block}.{names.norms[0]}", f"{path}/norm_attention", layers)
        table += rules.norm(f"{block}.{names.norms[1]}", f"{path}/norm_mlp", layers)
    table += rules.linear(f"{block}.{names.up}", f"{path}/mlp/up", layers)
    return table + rules.linear(f"{block}.{names.down}", f"{path}/mlp/down", layers)


def with_resolution(
    model: M,
    positions: np.ndarray | None,
    patch: int,
    extra: int = 1,
    stated: int | Sequence[int] | None = None,
) -> M:
    """Returns the model at the resolution of a position table [..., extra + N, D].

    The resolution is the `stated` one. Without it, the model keeps its own where that has N patches, and
    otherwise becomes a square.
    """
    if stated is not None:
        sides = (stated, stated) if isinstance(stated, int) else tuple(stated)
        unchanged = sides == side_lengths(model.resolution)  # type: ignore[attr-defined]
        return model if unchanged else model.clone(resolution=stated if isinstance(stated, int) else sides)
    if positions is None or positions.ndim < 2:
        return model
    height, width = side_lengths(model.resolution)  # type: ignore[attr-defined]
    count = positions.shape[-2] - extra
    if count < 1 or count == height // patch * (width // patch):
        return model
    return model.clone(resolution=math.isqrt(count) * patch)


# Swin


@dataclass(frozen=True)
class SwinNames:
    """The names of a Swin's parts; "{stage}" is a stage's number, from 0."""

    patch: str
    norm_patch: str
    norm: str
    head: str
    stage: str
    block: BlockNames
    bias: str  # the table of relative position biases, within a block
    leads: bool = False  # whether a stage begins with the merging before it, not ends with the one after it


def swin(model: Swin, names: SwinNames) -> Rules:
    """Returns the rules for the tensors that are trained."""
    table: Rules = [
        *rules.linear(names.patch, "patch", shape=rules.patches(model.patch, model.patch)),
        *rules.norm(names.norm_patch, "norm_patch"),
        *rules.norm(names.norm, "norm"),
        *rules.linear(names.head, "head"),
    ]
    for stage, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        block = f"{names.stage.format(stage=stage)}.blocks.{{i}}"
        for parity, name in enumerate(("plain", "shifted")):
            path, layers = f"stage{stage + 1}/{name}", range(parity, depth, 2)
            table += blocks(names.block, block, path, heads, layers)
            table += rules.tensor(f"{block}.{names.bias}", f"{path}/attention/relative_bias", layers=layers)
        if stage > 0:
            merging = f"{names.stage.format(stage=stage if names.leads else stage - 1)}.downsample"
            table += rules.norm(f"{merging}.norm", f"merging{stage + 1}/norm")
            table += rules.linear(f"{merging}.reduction", f"merging{stage + 1}/reduction", bias=False)
    return table


def with_window(model: Swin, tensors: Tensors, names: SwinNames) -> Swin:
    """Returns the model with the window M of the tensors' bias tables [(2M - 1)^2, heads]."""
    table = tensors.get(f"{names.stage.format(stage=0)}.blocks.0.{names.bias}")
    if table is None or table.ndim != 2 or not len(table):
        return model
    return model.clone(window=(math.isqrt(len(table)) + 1) // 2)


def swin_maps(model: Swin, inputs: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields the sides (h, w), in tokens, of each stage's map.

    Raises:
        UserError: if the window does not divide them. Other libraries then have smaller windows, and tables
            for these, or pad elsewhere than `Swin` does.
    """
    height, width = inputs["x"].shape[1:3]
    for stage in range(len(model.depths)):
        unit = model.patch * 2**stage
        if height % (unit * model.window) or width % (unit * model.window):
            raise UserError(
                f"model.window={model.window}: must divide the map of every stage for this format, and stage "
                f"{stage + 1} has {height / unit:g}x{width / unit:g} tokens"
            )
        yield height // unit, width // unit


# ResNet


@dataclass(frozen=True)
class ResNetNames:
    """The names of a ResNet's parts; "{stage}" is a stage's number, "{j}" that of a block's convolution."""

    stage: str
    convolution: str
    norm: str
    shortcut: tuple[str, str]  # the shortcut's convolution and norm
    first: int = 1  # the first number of stages and of convolutions


TORCHVISION = ResNetNames("layer{stage}", "conv{j}", "bn{j}", ("downsample.0", "downsample.1"))


def resnet_stages(
    depths: tuple[int, ...],
    bottleneck: bool,
    names: ResNetNames,
    name_prefix: str = "",
    path_prefix: str = "",
) -> Rules:
    """Returns the rules for all stages, whose names and paths begin with the given prefixes."""
    table: Rules = []
    for i, depth in enumerate(depths):
        stage = f"{name_prefix}{names.stage.format(stage=i + names.first)}"
        path = f"{path_prefix}stage{i + 1}"
        table += _residual(names, f"{stage}.0", f"{path}/first", bottleneck)
        if i > 0 or bottleneck:
            conv, norm = (f"{stage}.0.{name}" for name in names.shortcut)
            table += normed_convolution(conv, norm, f"{path}/first/shortcut", f"{path}/first/norm_shortcut")
        if depth > 1:
            table += _residual(names, stage + ".{i}", f"{path}/blocks", bottleneck, range(1, depth))
    return table


def _residual(names: ResNetNames, block: str, path: str, bottleneck: bool, layers: Layers = None) -> Rules:
    table: Rules = []
    for j in range(3 if bottleneck else 2):
        conv, norm = (name.format(j=j + names.first) for name in (names.convolution, names.norm))
        table += normed_convolution(
            f"{block}.{conv}", f"{block}.{norm}", f"{path}/conv{j + 1}", f"{path}/norm{j + 1}", layers
        )
    return table


def normed_convolution(conv: str, norm: str, conv_path: str, norm_path: str, layers: Layers = None) -> Rules:
    """Returns the rules for a convolution without bias and the BatchNorm after it."""
    return [
        *rules.convolution(conv, conv_path, layers, bias=False),
        *rules.batch_norm(norm, norm_path, layers),
    ]


COUNTERS = (r"\.num_batches_tracked$",)  # counters of training steps, one per BatchNorm; nothing reads them


def counters(table: Rules) -> dict[str, np.ndarray]:
    """Returns a counter of 0 for every running variance."""
    names = (name for rule in table for name in rules.names(rule))
    norms = (name.removesuffix("running_var") for name in names if name.endswith(".running_var"))
    return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}
