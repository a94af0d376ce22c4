"""The originals' networks, written plainly: modules with the names of their state dicts.

And the test that all of them serve: a network goes over to ours and back, bit for bit, and gives the same.
"""

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from scaling.convert import rules
from tests.support import parity

Tensors = dict[str, np.ndarray]


def tensors(net: nn.Module) -> Tensors:
    return {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}


def there_and_back(format: ModuleType, model: Any, net: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The variables that the table makes of a network, after checks that its state dict comes back from them.

    That is all of its tensors, no others, and the trained ones bit for bit.
    """
    given, table = tensors(net), format.table(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    assert rules.faults(table, given, shapes, getattr(format, "IGNORED", ())) == []
    variables = rules.load(table, given)
    trained = rules.save(table, variables)
    for name, tensor in trained.items():
        assert (tensor.dtype, tensor.shape) == (given[name].dtype, given[name].shape), name
        assert tensor.tobytes() == given[name].tobytes(), name
    buffers = format.buffers(model, inputs) if hasattr(format, "buffers") else {}
    assert not buffers.keys() & trained.keys()
    net.load_state_dict(
        {n: torch.from_numpy(np.array(t)) for n, t in (trained | buffers).items()}, strict=True
    )
    for name, tensor in buffers.items():
        assert (tensor.dtype, tensor.shape) == (given[name].dtype, given[name].shape), name
        np.testing.assert_allclose(tensor, given[name], atol=1e-6, err_msg=name)
    return variables


def compare(
    format: ModuleType,
    model: Any,
    net: nn.Module,
    inputs: Mapping[str, Any],
    call: Callable[[nn.Module], Any],
) -> None:
    """Holds ours to the network with random weights: within 1e-5 of what it gives in float64."""
    parity.randomise(net)
    variables = there_and_back(format, model, net, inputs)
    with torch.no_grad():
        expected = call(net.double().eval())
    out = parity.jit(model.apply)(variables, **inputs)
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert np.abs(np.asarray(ours) - theirs.numpy()).max() < 1e-5 * np.abs(theirs.numpy()).max()


def pixels(x: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W] float64."""
    return torch.from_numpy(x).double().permute(0, 3, 1, 2)


def names(format: ModuleType, model: Any, inputs: Mapping[str, Any]) -> list[str]:
    """All that an export holds."""
    trained = [name for rule in format.table(model) for name in rules.names(rule)]
    return sorted([*trained, *(format.buffers(model, inputs) if hasattr(format, "buffers") else ())])


# timm's layers, whose names Microsoft's and Meta's code share, and the Swin of timm's and Microsoft's


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, bias: Any = 0) -> torch.Tensor:
        """x [..., N, D]; bias [..., heads, N, N]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        logits = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1]) + bias
        return self.proj(torch.einsum("...hqk,...khd->...qhd", logits.softmax(-1), v).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1, self.fc2, self.form = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.form))


def patches(width: int, patch: int, channels: int = 3, **more: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch), **more})


class WindowAttention(Attention):
    def __init__(self, width: int, heads: int, window: int, buffers: bool) -> None:
        super().__init__(width, heads)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        places = [(y, x) for y in range(window) for x in range(window)]
        index = [
            [(y - v + window - 1) * (2 * window - 1) + x - u + window - 1 for v, u in places]
            for y, x in places
        ]
        self.register_buffer("relative_position_index", torch.tensor(index), persistent=buffers)


class SwinBlock(nn.Module):
    """On a map of `side` x `side` tokens."""

    def __init__(self, width: int, heads: int, window: int, side: int, shifted: bool, buffers: bool) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted and side > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = WindowAttention(width, heads, window, buffers), Mlp(width)
        mask = None
        if self.shift:  # tokens from opposite borders meet in the last windows, and must not attend
            rows = torch.arange(side)
            part = (rows >= side - window).long() + (rows >= side - self.shift).long()
            region = self.windows((3 * part[:, None] + part)[None, :, :, None])[0, ..., 0]  # [n, N]
            mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)
        self.register_buffer("attn_mask", mask, persistent=buffers)

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h, w, D] -> [B, n, N, D]."""
        x = x.unflatten(1, (-1, self.window)).unflatten(3, (-1, self.window))
        return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, attn = x.shape[1], self.attn
        bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
        if self.attn_mask is not None:
            bias = bias + self.attn_mask[:, None]
        h = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        h = attn(self.windows(h), bias).unflatten(2, (self.window, self.window))  # [B, n, M, M, D]
        h = h.unflatten(1, (side // self.window, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x + torch.roll(h, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Microsoft's, or timm's: there a stage begins with the merging, and buffers are not kept."""

    def __init__(
        self, timm: bool, patch: int, width: int, depths: Any, heads: Any, window: int, side: int
    ) -> None:
        super().__init__()
        self.timm = timm
        self.patch_embed = patches(width, patch, norm=nn.LayerNorm(width))
        side, self.layers = side // patch, nn.ModuleList()
        for stage, (depth, each) in enumerate(zip(depths, heads, strict=True)):
            wide = width * 2**stage
            blocks = (
                SwinBlock(wide, each, window, side // 2**stage, bool(i % 2), not timm) for i in range(depth)
            )
            layer = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
            before = wide // 2 if timm else wide
            if stage > 0 if timm else stage + 1 < len(depths):
                merging = {
                    "norm": nn.LayerNorm(4 * before),
                    "reduction": nn.Linear(4 * before, 2 * before, False),
                }
                layer["downsample"] = nn.ModuleDict(merging)
            self.layers.append(layer)
        self.norm, head = nn.LayerNorm(wide), nn.Linear(wide, 1000)
        self.head = nn.ModuleDict({"fc": head}) if timm else head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        for layer in self.layers:
            if self.timm and "downsample" in layer:
                x = self.merged(layer["downsample"], x)
            for block in layer["blocks"]:
                x = block(x)
            if not self.timm and "downsample" in layer:
                x = self.merged(layer["downsample"], x)
        x = self.norm(x).mean((1, 2))
        return (self.head["fc"] if self.timm else self.head)(x)

    def merged(self, merging: Any, x: torch.Tensor) -> torch.Tensor:
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return merging["reduction"](merging["norm"](torch.cat(corners, -1)))
