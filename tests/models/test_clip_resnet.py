"""CLIP's modified ResNet against a naive form, and every way to run it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn import functional as F

from scaling.errors import UserError
from scaling.models import clip, layers
from scaling.models.clip_resnet import Bottleneck, ModifiedResNet
from scaling.models.convolutions import Stage
from tests.support import parity
from tests.support.running import KEY, check_bfloat16, jit, largest_error, scalar

Tree = dict[str, Any]
SMALL: Tree = {"features": 10, "depth": (1, 1, 3, 1), "width": 128, "heads": 2, "resolution": 64}


def images(side: int = 64, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, side, side, 3)).astype(np.float32)


def random_variables(init: Any, x: np.ndarray) -> Any:
    """Kernels that keep activations of their size, norms of some effect, attention to more than one token."""
    rng = np.random.default_rng(2)

    def one(path: Any, leaf: Any) -> jax.Array:
        name, size = path[-1].key, math.prod(leaf.shape)
        x = rng.standard_normal(leaf.shape)
        if name == "kernel":
            stacked = any(k.key == "blocks" for k in path)
            fan_in = size / leaf.shape[-1] / (leaf.shape[0] if stacked else 1)
            if path[-2].key in ("query", "key", "value"):
                fan_in = leaf.shape[-3]
            x *= math.sqrt(2 / fan_in) * (0.4 if path[-2].key in ("query", "key") else 1)
        x = rng.uniform(0.5, 1.5, leaf.shape) if name in ("scale", "var") else x
        x *= 0.3 if path[-2].key == "norm3" and name == "scale" else 1  # or 16 blocks would add up to much
        return jnp.asarray(0.3 * x if name in ("bias", "mean") else x, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(init, KEY, x))


@pytest.fixture(scope="module")
def variables() -> Any:
    return random_variables(ModifiedResNet(**SMALL).init, images())


# A naive form, written from section 2.4 with none of the package's code


def naive_norm(p: Tree, s: Tree, x: torch.Tensor, train: bool) -> torch.Tensor:
    """x [B, C, H, W]. In training the statistics `s` become those after a step with momentum 0.9."""
    mean, var = s["mean"], s["var"]
    if train:
        flat = x.transpose(0, 1).reshape(x.shape[1], -1)
        mean, n = flat.mean(1), flat.shape[1]
        var = ((flat - mean[:, None]) ** 2).sum(1) / n
        s["mean"] = (0.9 * s["mean"] + 0.1 * mean).detach()
        s["var"] = (0.9 * s["var"] + 0.1 * var * n / (n - 1)).detach()
    mean, var, scale, bias = (t[None, :, None, None] for t in (mean, var, p["scale"], p["bias"]))
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + bias


def naive_convolution(p: Tree, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    kernel = p["kernel"].permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def naive_pool(x: torch.Tensor) -> torch.Tensor:
    """The mean of each 2x2 pixels."""
    corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return sum(corners[1:], corners[0]) / 4


def naive_bottleneck(p: Tree, s: Tree, x: torch.Tensor, halve: bool, train: bool) -> torch.Tensor:
    h = torch.relu(naive_norm(p["norm1"], s["norm1"], naive_convolution(p["conv1"], x), train))
    h = torch.relu(naive_norm(p["norm2"], s["norm2"], naive_convolution(p["conv2"], h), train))
    h, x = (naive_pool(h), naive_pool(x)) if halve else (h, x)
    h = naive_norm(p["norm3"], s["norm3"], naive_convolution(p["conv3"], h), train)
    if "shortcut" in p:
        x = naive_norm(p["norm_shortcut"], s["norm_shortcut"], naive_convolution(p["shortcut"], x), train)
    return torch.relu(h + x)


def naive_attention_pool(p: Tree, x: torch.Tensor) -> torch.Tensor:
    """One example, x [D, h, w] -> [features]; one head at a time."""
    pixels = [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]
    tokens = torch.stack([sum(pixels[1:], pixels[0]) / len(pixels), *pixels]) + p["positions"]  # [1 + N, D]
    a = p["attention"]
    out = a["out"]["bias"]
    for head in range(a["query"]["bias"].shape[0]):
        q, k, v = (tokens @ a[n]["kernel"][:, head] + a[n]["bias"][head] for n in ("query", "key", "value"))
        weights = torch.exp(k @ q[0] / math.sqrt(q.shape[1]))
        out = out + (weights / weights.sum()) @ v @ a["out"]["kernel"][head]
    return out


def naive_resnet(p: Tree, s: Tree, x: np.ndarray, train: bool) -> torch.Tensor:
    h = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        h = naive_convolution(p[f"stem{i}"], h, stride)
        h = torch.relu(naive_norm(p[f"norm_stem{i}"], s[f"norm_stem{i}"], h, train))
    h = naive_pool(h)
    for i in (1, 2, 3, 4):
        params, stats = p[f"stage{i}"], s[f"stage{i}"]
        h = naive_bottleneck(params["first"], stats["first"], h, i > 1, train)
        rest = params.get("blocks")
        for j in range(0 if rest is None else len(rest["conv1"]["kernel"])):
            one, its = (jax.tree.map(lambda leaf, j=j: leaf[j], t["blocks"]) for t in (params, stats))
            h = naive_bottleneck(one, its, h, False, train)
            stats["blocks"] = jax.tree.map(
                lambda all_, new, j=j: torch.cat([all_[:j], new[None], all_[j + 1 :]]), stats["blocks"], its
            )
    return torch.stack([naive_attention_pool(p["pool"], one) for one in h])


def compare_with_naive(model: ModifiedResNet, x: np.ndarray, train: bool) -> None:
    variables = jax.device_get(random_variables(model.init, x))
    double = functools.partial(torch.tensor, dtype=torch.float64)
    params = jax.tree.map(functools.partial(double, requires_grad=True), variables["params"])
    stats = jax.tree.map(double, variables["batch_stats"])
    out = naive_resnet(params, stats, x, train)
    (out * torch.from_numpy(parity.weights(tuple(out.shape)))).sum().backward()
    grads = jax.tree.map(lambda p: p.grad.numpy(), params)
    new = jax.tree.map(lambda s: s.float().numpy(), stats)
    for before, after in zip(*map(jax.tree.leaves, (variables["batch_stats"], new)), strict=True):
        assert np.array_equal(before, after) != train

    def call(variables: Any, x: jax.Array) -> Any:
        out, updated = model.apply(variables, x, train, mutable=["batch_stats"])
        return out, jax.lax.stop_gradient(updated["batch_stats"])

    parity.check(model, variables, {"x": x}, (out.detach().numpy(), new), grads, call)


def test_modified_resnet_in_training_against_a_naive_form() -> None:
    compare_with_naive(ModifiedResNet(**SMALL), images(), True)


def test_modified_resnet_against_a_naive_form(variables: Any) -> None:
    double = jax.tree.map(lambda v: torch.tensor(np.asarray(v), dtype=torch.float64), variables)
    expected = naive_resnet(double["params"], double["batch_stats"], images(), False).numpy()
    out = np.asarray(jit(ModifiedResNet(**SMALL).apply)(variables, images()))
    assert largest_error(out, expected) < 1e-4


@pytest.mark.slow
def test_rn50_against_the_naive_form() -> None:
    size = clip.SIZES["RN50"]
    tower = ModifiedResNet(size.embed_dim, (3, 4, 6, 3), size.width, size.heads, resolution=64)
    # So small that no activation is so near 0 that rounding takes it to the other side of a ReLU.
    compare_with_naive(tower, images(64, batch=1), False)


# Every way to run it


def run(stage: Stage, variables: Any, x: np.ndarray) -> tuple[Any, Any]:
    """What a stage makes in training, with the statistics after it, and the gradient of a weighted sum."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        both = {"params": params, "batch_stats": variables["batch_stats"]}
        out, new = stage.apply(both, x, True, mutable=["batch_stats"])
        return scalar(out), (out, new["batch_stats"])

    grads, out = jax.device_get(jit(jax.grad(loss, has_aux=True))(variables["params"]))
    return out, grads


def test_every_form_of_the_depth_gives_the_same() -> None:
    x, stage = images(8), functools.partial(Stage, functools.partial(Bottleneck, 4), 3, 2)
    variables = random_variables(functools.partial(stage("none", False).init, train=True), x)
    expected, expected_grads = run(stage("none", False), variables, x)
    out, grads = run(stage("dots", True), variables, x)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, expected[1], variables["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_bfloat16_is_close_and_its_features_float32(variables: Any) -> None:
    exact, out = (
        np.asarray(jit(ModifiedResNet(**SMALL, dtype=dtype).apply)(variables, images()))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    check_bfloat16(out, exact)


def test_forward_mode_agrees_with_finite_differences(variables: Any) -> None:
    model, h = ModifiedResNet(**SMALL), 3e-4  # so small that hardly a ReLU changes side

    @jit
    def at(nudge: float) -> Any:
        nudged = jax.tree.map(lambda p: p * (1 + nudge), variables["params"])
        return jax.jvp(
            lambda p: model.apply({"params": p, "batch_stats": variables["batch_stats"]}, images()),
            (nudged,),
            (variables["params"],),
        )

    slope = (np.asarray(at(h)[0]) - np.asarray(at(-h)[0])) / (2 * h)
    assert largest_error(np.asarray(at(0.0)[1]), slope) < 1e-2


def test_another_resolution_resizes_the_table_and_nothing_else(variables: Any) -> None:
    made_for_it, x = ModifiedResNet(**{**SMALL, "resolution": 96}), images(96)
    positions = variables["params"]["pool"]["positions"]
    patches = layers.resize_positions(positions[1:], (2, 2), (3, 3))
    pool = variables["params"]["pool"] | {"positions": jnp.concatenate([positions[:1], patches])}
    resized = variables | {"params": variables["params"] | {"pool": pool}}
    shapes = jax.eval_shape(made_for_it.init, KEY, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)
    expected = jit(made_for_it.apply)(resized, x)
    assert_allclose(jit(ModifiedResNet(**SMALL).apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_names_shapes_and_start_of_the_parameters() -> None:
    params = jax.device_get(jit(ModifiedResNet(**SMALL).init)(KEY, images(batch=1)))["params"]
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert flat["stem1/kernel"].shape == (3, 3, 3, 2)
    assert flat["stem3/kernel"].shape == (3, 3, 2, 4)
    assert flat["stage3/blocks/conv2/kernel"].shape == (2, 3, 3, 16, 16)
    assert flat["stage4/first/shortcut/kernel"].shape == (1, 1, 64, 128)
    assert flat["pool/positions"].shape == (5, 128)
    assert flat["pool/attention/query/kernel"].shape == (128, 2, 64)
    assert flat["pool/attention/out/kernel"].shape == (2, 64, 10)
    assert not any("stage2/blocks" in name or "stage4/blocks" in name for name in flat)  # of one block each
    for name, leaf in flat.items():
        if name.startswith("pool") and not name.endswith("bias"):
            assert leaf.std() == pytest.approx(128**-0.5, rel=4 / math.sqrt(leaf.size)), name
        elif name.endswith("kernel"):
            bound = math.prod(leaf.shape[-4:-1]) ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound, name
            assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(leaf.size)), name
        else:
            expected = 1 if name.endswith("scale") and not name.endswith("norm3/scale") else 0
            assert np.all(leaf == expected), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": (3, 0, 6, 3)}, r"depth=\(3, 0, 6, 3\): every stage must have at least 1 block"),
        ({"resolution": 230}, "resolution=230: must be a multiple of 32"),
        ({"width": 2000}, "width=2000: must be a multiple of 64"),
        ({"heads": 7}, "heads=7: must divide the width, which is 2048"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: Tree, message: str) -> None:
    model = clip.make("RN50", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **clip.inputs("RN50"))


def test_images_that_cannot_be_halved_five_times_are_refused() -> None:
    with pytest.raises(UserError, match="x: its height and width, 72x72, must be multiples of 32"):
        jax.eval_shape(ModifiedResNet(**SMALL).init, KEY, images(72))
