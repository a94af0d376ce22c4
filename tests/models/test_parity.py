"""The models against PyTorch: forward, and the gradient of every parameter, with random weights.

DiT's adaLN-Zero against diffusers, ViT against transformers, DiT's other blocks against a naive form here.
The references run in float64, so that what is measured is the error of one side.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from transformers import ViTConfig, ViTForImageClassification

from scaling.models import dit, vit

# Compiling is most of a test's time, and these need no fast code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DEPTH, WIDTH, HEADS = 3, 24, 3
RNG = np.random.default_rng(0)
Arrays = Mapping[str, np.ndarray]


def compare(
    model: Any, params: Any, inputs: dict[str, Any], expected: np.ndarray, expected_grads: Any
) -> None:
    """Forward within 1e-4 of the largest value; each gradient within 1e-3 of its tensor's largest value.

    Tensors whose gradient is nought but rounding (a key's bias, to which softmax is blind) are held to a
    thousandth of the model's largest gradient instead.
    """
    params, inputs = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), (params, inputs))
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply({"params": params}, **inputs)
        return jnp.sum(out * weights(out.shape)), out

    grads, out = jax.device_get(jit(jax.grad(loss, has_aux=True))(params))
    assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()
    floor = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert np.abs(e).max() > 0 or "key" in str(path), path
        assert np.abs(g - e).max() < 1e-3 * max(np.abs(e).max(), floor), path


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Of the outputs, in the sum whose gradient is compared."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def randomise(model: torch.nn.Module, scale: float = 0.2) -> None:
    for parameter in model.parameters():
        parameter.data = torch.from_numpy(scale * RNG.standard_normal(tuple(parameter.shape)))


def arrays(model: torch.nn.Module) -> tuple[Arrays, Arrays]:
    """The weights and their gradients, by name, in float32."""
    named = dict(model.named_parameters())
    values = {name: p.detach().numpy().astype(np.float32) for name, p in named.items()}
    return values, {
        name: p.grad.numpy().astype(np.float32) for name, p in named.items() if p.grad is not None
    }


# The outside layout -> ours. Every step is linear, so gradients go through it as weights do.


def linear(a: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"kernel": a[f"{name}.weight"].T, "bias": a[f"{name}.bias"]}


def norm(a: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"scale": a[f"{name}.weight"], "bias": a[f"{name}.bias"]}


def patch(a: Arrays, name: str) -> dict[str, np.ndarray]:
    kernel = a[f"{name}.weight"]  # [D, C, p, p]
    return {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]), "bias": a[f"{name}.bias"]}


def attention(a: Arrays, query: str, key: str, value: str, out: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for ours, theirs in (("query", query), ("key", key), ("value", value)):
        layer = linear(a, theirs)
        made[ours] = {
            "kernel": layer["kernel"].reshape(WIDTH, HEADS, -1),
            "bias": layer["bias"].reshape(HEADS, -1),
        }
    layer = linear(a, out)
    return {**made, "out": {"kernel": layer["kernel"].reshape(HEADS, -1, WIDTH), "bias": layer["bias"]}}


def stacked(block: Callable[[int], Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, range(DEPTH)))


def dit_params(a: Arrays) -> dict[str, Any]:
    def block(i: int) -> dict[str, Any]:
        b = f"transformer_blocks.{i}"
        return {
            "modulation": linear(a, f"{b}.norm1.linear"),
            "attention": attention(a, *(f"{b}.attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0"))),
            "mlp": {"up": linear(a, f"{b}.ff.net.0.proj"), "down": linear(a, f"{b}.ff.net.2")},
        }

    embedders = "transformer_blocks.0.norm1.emb"
    time = f"{embedders}.timestep_embedder"
    return {
        "patch": patch(a, "pos_embed.proj"),
        "time": {"up": linear(a, f"{time}.linear_1"), "down": linear(a, f"{time}.linear_2")},
        "label": {"embedding": a[f"{embedders}.class_embedder.embedding_table.weight"]},
        "blocks": stacked(block),
        "final": {"modulation": linear(a, "proj_out_1"), "linear": linear(a, "proj_out_2")},
    }


def test_dit_against_diffusers() -> None:
    reference = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH, in_channels=4,
        out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    embedders = reference.transformer_blocks[0].norm1.emb
    embedders.time_proj.downscale_freq_shift = 0  # diffusers' frequencies are not the paper's
    for block in reference.transformer_blocks:
        block.norm1.emb = embedders  # DiT has one; diffusers repeats it in every block
    randomise(reference.double())
    x = RNG.standard_normal((3, 8, 8, 4)).astype(np.float32)
    t, y = np.array([0, 250, 999]), np.array([3, 7, 10])

    images = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    out = reference(images, torch.from_numpy(t), torch.from_numpy(y)).sample.permute(0, 2, 3, 1)
    (out * torch.from_numpy(weights(tuple(out.shape)))).sum().backward()
    values, grads = map(dit_params, arrays(reference))

    model = dit.DiT(patch=2, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=10)
    inputs = {"x": x, "t": t.astype(np.float32), "y": y.astype(np.int32)}
    compare(model, values, inputs, out.detach().numpy(), grads)


def vit_params(a: Arrays) -> dict[str, Any]:
    def block(i: int) -> dict[str, Any]:
        b = f"vit.layers.{i}"
        return {
            "norm_attention": norm(a, f"{b}.layernorm_before"),
            "attention": attention(a, *(f"{b}.attention.{n}_proj" for n in "qkvo")),
            "norm_mlp": norm(a, f"{b}.layernorm_after"),
            "mlp": {"up": linear(a, f"{b}.mlp.fc1"), "down": linear(a, f"{b}.mlp.fc2")},
        }

    return {
        "patch": patch(a, "vit.embeddings.patch_embeddings.projection"),
        "token": a["vit.embeddings.cls_token"][0],
        "positions": a["vit.embeddings.position_embeddings"][0],
        "blocks": stacked(block),
        "norm": norm(a, "vit.layernorm"),
        "head": linear(a, "classifier"),
    }


def test_vit_against_transformers() -> None:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        image_size=12, patch_size=4, num_channels=3, num_labels=7, hidden_act="gelu", layer_norm_eps=1e-6,
    )  # fmt: skip
    reference = ViTForImageClassification(config).eval().double()
    randomise(reference, 0.5)  # enough for the two forms of GELU to differ
    x = RNG.standard_normal((3, 12, 12, 3)).astype(np.float32)
    out = reference(torch.from_numpy(x).double().permute(0, 3, 1, 2)).logits
    (out * torch.from_numpy(weights(tuple(out.shape)))).sum().backward()
    values, grads = map(vit_params, arrays(reference))

    model = vit.ViT(patch=4, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=7, resolution=12)
    compare(model, values, {"x": x}, out.detach().numpy(), grads)


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
    if kind == "adaln":
        c = t + y
        shift1, scale1, shift2, scale2 = naive_linear(p["modulation"], c * torch.sigmoid(c)).split(WIDTH)
        h = naive_norm(x) * (1 + scale1) + shift1
        x = x + naive_attention(p["attention"], h, h)
        return x + naive_mlp(p["mlp"], naive_norm(x) * (1 + scale2) + shift2)
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
    if kind == "adaln":
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


@pytest.mark.parametrize("kind", ["in-context", "cross-attention", "adaln"])
def test_the_other_blocks_of_dit_against_a_naive_form(kind: Any) -> None:
    x = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
    inputs = {"x": x, "t": np.array([3.0, 640.0], np.float32), "y": np.array([2, 10], np.int32)}
    model = dit.DiT(patch=2, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=10, block=kind)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    scale = 0.2 if kind == "adaln" else 0.7  # enough for the two forms of GELU to differ
    params = jax.tree.map(lambda s: (scale * RNG.standard_normal(s.shape)).astype(np.float32), shapes)

    theirs = jax.tree.map(lambda p: torch.tensor(p, dtype=torch.float64, requires_grad=True), params)
    out = torch.stack([naive_dit(theirs, kind, *example) for example in zip(*inputs.values(), strict=True)])
    (out * torch.from_numpy(weights(tuple(out.shape)))).sum().backward()
    grads = jax.tree.map(lambda p: p.grad.numpy(), theirs)
    compare(model, params, inputs, out.detach().numpy(), grads)
