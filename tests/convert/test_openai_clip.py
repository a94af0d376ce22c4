"""OpenAI's CLIP, written plainly, against ours: both image towers, their names, and other forms refused."""

import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn

from scaling.convert import rules
from scaling.convert.openai import clip as openai
from scaling.errors import UserError
from scaling.models import clip
from tests.support import originals

TEXT: dict[str, Any] = {"text_width": 128, "text_depth": 2, "text_heads": 2, "vocabulary": 30, "context": 9}
VIT = clip.CLIP(patch=4, width=64, depth=3, heads=1, resolution=12, embed_dim=10, **TEXT)
RESNET = clip.CLIP(patch=None, width=128, depth=(2, 1, 1, 2), heads=2, resolution=64, embed_dim=10, **TEXT)
TOWERS = pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


def transformer(width: int, depth: int) -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width) for _ in range(depth))})


def through(blocks: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    for block in blocks["resblocks"]:
        x = block(x, mask)
    return x


class ViT(nn.Module):
    def __init__(self, model: clip.CLIP) -> None:
        super().__init__()
        width, patch = model.width, model.patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (model.resolution // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = transformer(width, model.depth)
        self.proj = nn.Parameter(torch.zeros(width, model.embed_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = through(self.transformer, self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        for i, (a, b, side) in enumerate(((before, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, side, padding=side // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        if stride > 1 or before != 4 * width:
            shortcut = {"0": nn.Conv2d(before, 4 * width, 1, bias=False), "1": nn.BatchNorm2d(4 * width)}
            self.downsample = nn.ModuleDict(shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        h = self.bn3(self.conv3(nn.functional.avg_pool2d(h, self.stride)))
        if hasattr(self, "downsample"):
            x = self.downsample["1"](self.downsample["0"](nn.functional.avg_pool2d(x, self.stride)))
        return (x + h).relu()


class AttentionPool(nn.Module):
    def __init__(self, width: int, side: int, features: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(1 + side**2, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (f(x).unflatten(-1, (-1, 64)) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = torch.einsum("bhd,bkhd->bhk", q[:, 0], k).div(8).softmax(-1)
        return self.c_proj(torch.einsum("bhk,bkhd->bhd", weights, v).flatten(1))


class ResNet(nn.Module):
    def __init__(self, model: clip.CLIP) -> None:
        super().__init__()
        width = model.width // 32
        for i, (a, b) in enumerate(((3, width // 2), (width // 2, width // 2), (width // 2, width)), 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, 3, 2 if i == 1 else 1, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        before = width
        for i, depth in enumerate(model.depth):
            stage, wide = nn.ModuleList(), width * 2**i
            for j in range(depth):
                stage.append(Bottleneck(before, wide, 2 if i > 0 and j == 0 else 1))
                before = 4 * wide
            self.add_module(f"layer{i + 1}", stage)
        self.attnpool = AttentionPool(model.width, model.resolution // 32, model.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        x = nn.functional.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.attnpool(x)


class CLIP(nn.Module):
    def __init__(self, model: clip.CLIP) -> None:
        super().__init__()
        width = model.text_width
        self.visual = ViT(model) if model.patch else ResNet(model)
        self.transformer = transformer(width, model.text_depth)
        self.token_embedding = nn.Embedding(model.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(model.context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, model.embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> Any:
        image, length = self.visual(x), text.shape[1]
        causal = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
        h = self.token_embedding(text) + self.positional_embedding
        h = self.ln_final(through(self.transformer, h, causal))
        words = h[torch.arange(len(text)), text.argmax(1)] @ self.text_projection
        units = (each / each.norm(dim=1, keepdim=True) for each in (image, words))
        return clip.Embeddings(*units, self.logit_scale.exp())


def inputs(model: clip.CLIP) -> dict[str, np.ndarray]:
    rng, side = np.random.default_rng(0), model.resolution
    text = rng.integers(0, 29, (2, 9)).astype(np.int32)
    text[0, 4] = text[1, 8] = 29
    return {"x": rng.standard_normal((2, side, side, 3)).astype(np.float32), "text": text}


@TOWERS
def test_it_goes_there_and_back_and_gives_the_same(model: clip.CLIP) -> None:
    given = inputs(model)
    text = torch.from_numpy(given["text"]).long()
    originals.compare(openai, model, CLIP(model), given, lambda net: net(originals.pixels(given["x"]), text))


@pytest.mark.parametrize(("variant", "count"), [("ViT-B/32", 302), ("RN50", 434 + 55)])
def test_names_at_full_size(variant: str, count: int) -> None:
    model = clip.make(variant)
    with torch.device("meta"):
        net = CLIP(model)
    names = originals.names(openai, model, clip.inputs(variant))
    assert names == sorted(net.state_dict())
    assert len(names) == count  # of OpenAI's; of the ResNet's, the last 55 are counters


def test_the_archives_own_numbers_are_not_read() -> None:
    given = originals.tensors(CLIP(VIT))
    shapes = jax.eval_shape(lambda: VIT.init(jax.random.key(0), **inputs(VIT)))
    numbers = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), np.array(12))
    assert rules.faults(openai.table(VIT), given | numbers, shapes, openai.IGNORED) == []
    assert rules.faults(openai.table(VIT), given | {"visual.vocab_size": X}, shapes, openai.IGNORED) == [
        "unexpected visual.vocab_size"
    ]


X = np.zeros(1, np.float32)


@TOWERS
def test_a_file_for_another_resolution_is_resized(model: clip.CLIP) -> None:
    given, other = originals.tensors(CLIP(model)), model.clone(resolution=2 * model.resolution)
    assert openai.source(other, given, None) == model
    assert openai.source(model, given, None) == openai.source(model, {}, None) == model
    variables, said = clip.resized(rules.load(openai.table(model), given), model, other)
    shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), **inputs(other)))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    path, grids = ("image/positions", "3x3 to 6x6") if model.patch else ("image/pool/positions", "2x2 to 4x4")
    assert said == [f"{path}: resized from {grids} patches"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 2}, r"model\.heads=2: must be width / 64, which is 1"),
        ({"text_heads": 1}, r"model\.text_heads=1: must be text_width / 64, which is 2"),
        ({"activation": "gelu"}, r"model\.activation=gelu: must be quick_gelu, the only one in this format"),
        ({"mlp_ratio": 2.0}, r"model\.mlp_ratio=2\.0: must be 4\.0"),
        ({"depth": (1, 1, 1, 1)}, r"model\.depth=\(1, 1, 1, 1\): must be one number for a ViT"),
        ({"patch": None}, r"model\.depth=3: must be four numbers for a modified ResNet"),
    ],
)
def test_other_forms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        openai.table(VIT.clone(**options))
