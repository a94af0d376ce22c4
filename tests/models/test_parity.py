"""The models against PyTorch: forward, and the gradient of every parameter, with random weights.

DiT in diffusers' form against diffusers, ViT against transformers, every block of DiT against a naive form.
The references run in float64, so that what is measured is the error of one side.
"""

import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from transformers import ViTConfig, ViTForImageClassification

from scaling.convert.diffusers import dit as diffusers_dit
from scaling.convert.huggingface import vit as huggingface_vit
from scaling.models import dit, vit
from tests.support import parity, running

DEPTH, WIDTH, HEADS = 3, 24, 3
DIFFUSERS: dict[str, Any] = {"frequency_shift": 1, "mlp_epsilon": 1e-5}  # otherwise than the authors' code
RNG = np.random.default_rng(0)


def compare_dit(model: dit.DiT, side: int, scale: float) -> None:
    reference = DiTTransformer2DModel(
        num_attention_heads=model.heads, attention_head_dim=model.width // model.heads,
        num_layers=model.depth, in_channels=4, out_channels=8, sample_size=side, patch_size=model.patch,
        num_embeds_ada_norm=model.num_classes,
    ).eval()  # fmt: skip
    parity.randomise(reference.double(), scale)
    embedders = [block.norm1.emb for block in reference.transformer_blocks]
    for each in embedders:
        each.load_state_dict(embedders[0].state_dict())  # DiT has one; diffusers repeats it in every block
    x = RNG.standard_normal((3, side, side, 4)).astype(np.float32)
    t, y = np.array([0, 250, 999]), np.array([3, 7, model.num_classes])
    images = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    out = reference(images, torch.from_numpy(t), torch.from_numpy(y)).sample.permute(0, 2, 3, 1)

    inputs = {"x": x, "t": t.astype(np.float32), "y": y.astype(np.int32)}
    parity.compare(model, diffusers_dit.table(model), inputs, reference, out)


def test_dit_against_diffusers() -> None:
    model = dit.DiT(patch=2, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=10, **DIFFUSERS)
    compare_dit(model, side=8, scale=0.2)


@pytest.mark.slow  # 33 million parameters
def test_dit_s_2_against_diffusers() -> None:
    compare_dit(dit.make("S/2", **DIFFUSERS), side=32, scale=0.05)


def compare_vit(model: vit.ViT, reference: ViTForImageClassification, batch: int) -> None:
    x = RNG.standard_normal((batch, model.resolution, model.resolution, 3)).astype(np.float32)
    out = reference(torch.from_numpy(x).double().permute(0, 3, 1, 2)).logits
    parity.compare(model, huggingface_vit.table(model), {"x": x}, reference, out)


def test_vit_against_transformers() -> None:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        image_size=12, patch_size=4, num_channels=3, num_labels=7, hidden_act="gelu", layer_norm_eps=1e-3,
    )  # fmt: skip
    reference = ViTForImageClassification(config).eval().double()
    parity.randomise(reference, 0.5)  # enough for the two forms of GELU to differ
    model = vit.ViT(
        patch=4, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=7, resolution=12, epsilon=1e-3
    )
    compare_vit(model, reference, batch=3)


@pytest.mark.slow  # 87 million parameters
def test_vit_b_16_against_transformers() -> None:
    config = ViTConfig(num_labels=1000, layer_norm_eps=1e-6)  # for the rest, transformers' default is B/16
    torch.manual_seed(0)
    reference = ViTForImageClassification(config).eval().double()
    parity.randomise(reference, 0.05, kept=1)
    compare_vit(vit.make("B/16"), reference, batch=2)


# A naive DiT: one example, one head at a time, written from the paper with none of the package's code.

Tree = dict[str, Any]


def naive_linear(p: Tree, x: torch.Tensor) -> torch.Tensor:
    return x @ p["kernel"] + p["bias"]


def naive_norm(x: torch.Tensor, p: Tree | None = None) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    return x if p is None else x * p["scale"] + p["bias"]


def naive_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_attention(p: Tree, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    out = p["out"]["bias"]
    for head in range(HEADS):
        q = x @ p["query"]["kernel"][:, head] + p["query"]["bias"][head]  # [N, d]
        k = context @ p["key"]["kernel"][:, head] + p["key"]["bias"][head]  # [M, d]
        v = context @ p["value"]["kernel"][:, head] + p["value"]["bias"][head]  # [M, d]
        logits = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
        out = out + (logits / logits.sum(1, keepdim=True)) @ v @ p["out"]["kernel"][head]
    return out


def naive_mlp(p: Tree, x: torch.Tensor) -> torch.Tensor:
    return naive_linear(p["down"], naive_gelu(naive_linear(p["up"], x)))


def naive_block(p: Tree, kind: str, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if kind.startswith("adaln"):
        c = t + y
        m = list(naive_linear(p["modulation"], c * torch.sigmoid(c)).split(WIDTH))
        gate1, gate2 = (m.pop(2), m.pop()) if kind == "adaln-zero" else (1, 1)
        shift1, scale1, shift2, scale2 = m
        h = naive_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * naive_attention(p["attention"], h, h)
        return x + gate2 * naive_mlp(p["mlp"], naive_norm(x) * (1 + scale2) + shift2)
    h = naive_norm(x, p["norm_attention"])
    x = x + naive_attention(p["attention"], h, h)
    if kind == "cross-attention":
        h = naive_norm(x, p["norm_cross_attention"])
        x = x + naive_attention(p["cross_attention"], h, torch.stack([t, y]))
    return x + naive_mlp(p["mlp"], naive_norm(x, p["norm_mlp"]))


def naive_position(row: int, column: int) -> list[float]:
    scales = [10000 ** (-i / (WIDTH // 4)) for i in range(WIDTH // 4)]
    return [f(n * s) for n in (column, row) for f in (math.sin, math.cos) for s in scales]


def naive_dit(p: Tree, kind: str, x: np.ndarray, t: float, y: int) -> torch.Tensor:
    """One example: x [H, W, C] -> [H, W, 2C], with patches of 2."""
    rows, columns = x.shape[0] // 2, x.shape[1] // 2
    tokens = []
    for r, c in np.ndindex(rows, columns):
        pixels = torch.tensor(x[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1), dtype=torch.float64)
        tokens.append(
            naive_linear(p["patch"], pixels) + torch.tensor(naive_position(r, c), dtype=torch.float64)
        )
    angles = [t * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    time = torch.tensor([f(a) for f in (math.cos, math.sin) for a in angles], dtype=torch.float64)
    time = naive_linear(p["time"]["up"], time)
    time = naive_linear(p["time"]["down"], time * torch.sigmoid(time))
    label = p["label"]["embedding"][y]
    if kind == "in-context":
        tokens += [time, label]
    h = torch.stack(tokens)
    for i in range(DEPTH):
        h = naive_block(jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"]), kind, h, time, label)
    h, final = h[: rows * columns], p["final"]
    if kind.startswith("adaln"):
        c = time + label
        shift, scale = naive_linear(final["modulation"], c * torch.sigmoid(c)).split(WIDTH)
        h = naive_norm(h) * (1 + scale) + shift
    else:
        h = naive_norm(h, final["norm"])
    h = naive_linear(final["linear"], h)  # [N, 2 * 2 * 2C]
    out = [
        [h[r // 2 * columns + c // 2].reshape(2, 2, -1)[r % 2, c % 2] for c in range(2 * columns)]
        for r in range(2 * rows)
    ]
    return torch.stack([torch.stack(row) for row in out])


@pytest.mark.parametrize("kind", ["in-context", "cross-attention", "adaln", "adaln-zero"])
def test_the_blocks_of_dit_against_a_naive_form(kind: Any) -> None:
    x = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
    inputs = {"x": x, "t": np.array([3.0, 640.0], np.float32), "y": np.array([2, 10], np.int32)}
    model = dit.DiT(patch=2, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=10, block=kind)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    scale = 0.2 if kind.startswith("adaln") else 0.7  # enough for the two forms of GELU to differ
    params = jax.tree.map(lambda s: (scale * RNG.standard_normal(s.shape)).astype(np.float32), shapes)
    for name, leaf in running.named(params).items():
        leaf *= 0.1 if "query" in name else 1  # or attention to one token alone: keys without a gradient

    theirs = jax.tree.map(lambda p: torch.tensor(p, dtype=torch.float64, requires_grad=True), params)
    out = torch.stack([naive_dit(theirs, kind, *example) for example in zip(*inputs.values(), strict=True)])
    (out * torch.from_numpy(parity.weights(tuple(out.shape)))).sum().backward()
    grads = jax.tree.map(lambda p: p.grad.numpy(), theirs)
    parity.check(model, {"params": params}, inputs, out.detach().numpy(), grads)
