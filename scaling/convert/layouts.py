"""What the files of several formats have in common, with each format's names as data.

What a model or a config.json must say, the blocks of transformers, Swin's stages and ResNet's.
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


# What must be so


def only(model: nn.Module, **values: Any) -> None:
    """Raises UserError where a field of the model is not what it must be for a format."""
    for name, value in values.items():
        if getattr(model, name) != value:
            raise UserError(
                f"model.{name}={getattr(model, name)}: must be {value}, the only one in this format"
            )


def labels(count: int) -> dict[str, Any]:
    """What transformers reads the number of classes from."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(count)},
        "label2id": {f"LABEL_{i}": i for i in range(count)},
    }


# Blocks of transformers


@dataclass(frozen=True)
class BlockNames:
    """The parts of a transformer block: attention and an MLP, with a norm before each.

    `qkv` names three linear layers, or what precedes "weight" and "bias" of the one that is all three.
    """

    qkv: tuple[str, str, str] | str
    out: str
    up: str
    down: str
    norms: tuple[str, str] | None = None  # None where they have no parameters


TRANSFORMERS = BlockNames(  # the ViT of Hugging Face's library, and most that came after it
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
TIMM = BlockNames("attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2", norms=("norm1", "norm2"))


def blocks(names: BlockNames, theirs: str, ours: str, heads: int, layers: Layers) -> Rules:
    """A stack of blocks; `theirs` is the name of one, with "{i}" for its number."""
    layers = None if layers is None else tuple(layers)
    out = f"{theirs}.{names.out}"
    if isinstance(names.qkv, str):
        weight, bias = (f"{theirs}.{names.qkv}{part}" for part in ("weight", "bias"))
        made = rules.fused_attention(weight, bias, out, f"{ours}/attention", heads, layers)
    else:
        query, key, value = (f"{theirs}.{name}" for name in names.qkv)
        made = rules.attention(query, key, value, out, f"{ours}/attention", heads, layers)
    if names.norms is not None:
        made += rules.norm(f"{theirs}.{names.norms[0]}", f"{ours}/norm_attention", layers)
        made += rules.norm(f"{theirs}.{names.norms[1]}", f"{ours}/norm_mlp", layers)
    made += rules.linear(f"{theirs}.{names.up}", f"{ours}/mlp/up", layers)
    return made + rules.linear(f"{theirs}.{names.down}", f"{ours}/mlp/down", layers)


def with_resolution(
    model: M,
    positions: np.ndarray | None,
    patch: int,
    extra: int = 1,
    stated: int | Sequence[int] | None = None,
) -> M:
    """Returns the model for the resolution that a position table [..., extra + N, D] is for.

    It is the `stated` one; where nothing states it, the model's own if that has as many patches, else a
    square.
    """
    if stated is not None:
        sides = (stated, stated) if isinstance(stated, int) else tuple(stated)
        same = sides == side_lengths(model.resolution)  # type: ignore[attr-defined]
        return model if same else model.clone(resolution=stated if isinstance(stated, int) else sides)
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
    """The parts of a Swin. Of a stage, "{stage}" is the number, from 0."""

    patch: str
    norm_patch: str
    norm: str
    head: str
    stage: str
    block: BlockNames
    bias: str  # the table of relative positions, within a block
    leads: bool = False  # a stage begins with the merging before it, instead of ending with the one after


def swin(model: Swin, names: SwinNames) -> Rules:
    """The tensors that are trained."""
    made: Rules = [
        *rules.linear(names.patch, "patch", shape=rules.patches(model.patch, model.patch)),
        *rules.norm(names.norm_patch, "norm_patch"),
        *rules.norm(names.norm, "norm"),
        *rules.linear(names.head, "head"),
    ]
    for stage, (depth, heads) in enumerate(zip(model.depths, model.heads, strict=True)):
        block = f"{names.stage.format(stage=stage)}.blocks.{{i}}"
        for parity, name in enumerate(("plain", "shifted")):
            ours, layers = f"stage{stage + 1}/{name}", range(parity, depth, 2)
            made += blocks(names.block, block, ours, heads, layers)
            made += rules.tensor(f"{block}.{names.bias}", f"{ours}/attention/relative_bias", layers=layers)
        if stage > 0:
            merging = f"{names.stage.format(stage=stage if names.leads else stage - 1)}.downsample"
            made += rules.norm(f"{merging}.norm", f"merging{stage + 1}/norm")
            made += rules.linear(f"{merging}.reduction", f"merging{stage + 1}/reduction", bias=False)
    return made


def with_window(model: Swin, tensors: Tensors, names: SwinNames) -> Swin:
    """The model with the window M that the tensors' bias tables [(2M - 1)^2, heads] are for."""
    table = tensors.get(f"{names.stage.format(stage=0)}.blocks.0.{names.bias}")
    if table is None or table.ndim != 2 or not len(table):
        return model
    return model.clone(window=(math.isqrt(len(table)) + 1) // 2)


def swin_maps(model: Swin, inputs: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The sides (h, w), in tokens, of each stage's map.

    Raises: UserError where the window does not divide them. Other libraries then have smaller windows, and
    tables for these, or pad elsewhere than `Swin` does.
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
    """The parts of a ResNet's stages: "{stage}" is a stage's number, "{j}" that of a block's convolution."""

    stage: str
    convolution: str
    norm: str
    shortcut: tuple[str, str]  # its convolution and its norm
    first: int = 1  # what the numbers begin with


TORCHVISION = ResNetNames("layer{stage}", "conv{j}", "bn{j}", ("downsample.0", "downsample.1"))


def resnet_stages(
    depths: tuple[int, ...], bottleneck: bool, names: ResNetNames, theirs: str = "", ours: str = ""
) -> Rules:
    """All stages, behind the prefixes `theirs` and `ours`."""
    made: Rules = []
    for i, depth in enumerate(depths):
        their, stage = f"{theirs}{names.stage.format(stage=i + names.first)}", f"{ours}stage{i + 1}"
        made += _residual(names, f"{their}.0", f"{stage}/first", bottleneck)
        if i > 0 or bottleneck:
            conv, norm = (f"{their}.0.{name}" for name in names.shortcut)
            made += normed_convolution(conv, norm, f"{stage}/first/shortcut", f"{stage}/first/norm_shortcut")
        if depth > 1:
            made += _residual(names, their + ".{i}", f"{stage}/blocks", bottleneck, range(1, depth))
    return made


def _residual(names: ResNetNames, theirs: str, ours: str, bottleneck: bool, layers: Layers = None) -> Rules:
    made: Rules = []
    for j in range(3 if bottleneck else 2):
        conv, norm = (name.format(j=j + names.first) for name in (names.convolution, names.norm))
        made += normed_convolution(
            f"{theirs}.{conv}", f"{theirs}.{norm}", f"{ours}/conv{j + 1}", f"{ours}/norm{j + 1}", layers
        )
    return made


def normed_convolution(
    theirs: str, their_norm: str, ours: str, our_norm: str, layers: Layers = None
) -> Rules:
    """A convolution without bias, and the BatchNorm after it."""
    return [
        *rules.convolution(theirs, ours, layers, bias=False),
        *rules.batch_norm(their_norm, our_norm, layers),
    ]


COUNTERS = (r"\.num_batches_tracked$",)  # of training steps, one a BatchNorm; nothing reads them


def counters(table: Rules) -> dict[str, np.ndarray]:
    """The counter beside every running variance, at 0."""
    names = (name for rule in table for name in rules.names(rule))
    norms = (name.removesuffix("running_var") for name in names if name.endswith(".running_var"))
    return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}
