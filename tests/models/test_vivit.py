"""ViViT: the factorised models against a naive form, how it starts, alone and from a ViT, and other sizes.

What it shares with TimeSformer stands in test_video, parity of the joint model with the converter.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from scaling.errors import UserError
from scaling.models import layers, table, video, vivit
from tests.support import parity
from tests.support import video as shared
from tests.support.running import KEY, block_kernels, random_params, run
from tests.support.video import a_vit, check_closely, check_start, features, videos

JOINT, ENCODER, SELF, DOT = MODELS = (
    "joint",
    "factorised-encoder",
    "factorised-self-attention",
    "factorised-dot-product",
)
SMALL: dict[str, Any] = {**shared.SMALL, "temporal_depth": 2}


# A naive ViViT: one video, one query and one head at a time, with none of the package's code.

Tree = dict[str, Any]
Who = Callable[[int, int], list[int]]  # the tokens that a token attends to, in a head
T, H, W = 3, 2, 2
N = T * H * W


def everyone(count: int) -> Who:
    return lambda token, head: list(range(count))


def same_frame(token: int, head: int) -> list[int]:
    return [other for other in range(N) if other // (H * W) == token // (H * W)]


def same_place(token: int, head: int) -> list[int]:
    return [other for other in range(N) if other % (H * W) == token % (H * W)]


def naive_linear(p: Tree, x: torch.Tensor) -> torch.Tensor:
    return x @ p["kernel"] + p["bias"]


def naive_norm(p: Tree, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * p["scale"] + p["bias"]


def naive_attention(p: Tree, x: torch.Tensor, who: Who) -> torch.Tensor:
    heads, depth = p["query"]["bias"].shape
    rows = []
    for token in range(len(x)):
        out = p["out"]["bias"]
        for head in range(heads):
            others = x[who(token, head)]
            q, k, v = (
                y @ p[name]["kernel"][:, head] + p[name]["bias"][head]
                for name, y in (("query", x[token]), ("key", others), ("value", others))
            )
            logits = torch.exp(k @ q / math.sqrt(depth))  # [M]
            out = out + (logits / logits.sum()) @ v @ p["out"]["kernel"][head]
        rows.append(out)
    return torch.stack(rows)


def naive_mlp(p: Tree, x: torch.Tensor) -> torch.Tensor:
    x = naive_linear(p["up"], x)
    x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return naive_linear(p["down"], x)


def naive_encoder(p: Tree, norm: Tree, x: torch.Tensor, who: Who) -> torch.Tensor:
    for i in range(len(p["norm_mlp"]["scale"])):
        b = jax.tree.map(lambda leaf, i=i: leaf[i], p)
        x = x + naive_attention(b["attention"], naive_norm(b["norm_attention"], x), who)
        if "temporal_attention" in b:
            h = naive_norm(b["norm_temporal"], x)
            x = x + naive_attention(b["temporal_attention"], h, same_place)
        x = x + naive_mlp(b["mlp"], naive_norm(b["norm_mlp"], x))
    return naive_norm(norm, x)


def naive_vivit(p: Tree, model: vivit.ViViT, x: np.ndarray) -> torch.Tensor:
    """One video [T, H, W, C] -> logits [classes], with tubelets of 2 x 2 x 2."""
    tokens = []
    for t, h, w in itertools.product(range(T), range(H), range(W)):
        pixels = x[2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].reshape(-1)
        tokens.append(naive_linear(p["patch"], torch.tensor(pixels, dtype=torch.float64)))
    if model.attention == ENCODER:
        moments = [p["temporal_token"][0]]
        for t in range(T):
            frame = torch.stack([p["token"][0], *tokens[t * H * W : (t + 1) * H * W]])
            frame = naive_encoder(p["blocks"], p["norm"], frame + p["positions"], everyone(H * W + 1))
            moments.append(frame[0])
        x = torch.stack(moments) + p["temporal_positions"]
        x = naive_encoder(p["temporal_blocks"], p["temporal_norm"], x, everyone(T + 1))[0]
    else:
        who: Who = same_frame
        if model.attention == DOT:
            half = model.heads // 2
            who = lambda token, head: (same_place if head < half else same_frame)(token, head)  # noqa: E731
        x = naive_encoder(p["blocks"], p["norm"], torch.stack(tokens) + p["positions"], who)
        x = sum(x) / N
    return naive_linear(p["head"], x)


@pytest.mark.parametrize("attention", MODELS[1:])
def test_factorised_models_against_a_naive_form(attention: Any) -> None:
    sizes = {**SMALL, "width": 12, "heads": 4, "frames": 2 * T, "resolution": (2 * H, 2 * W)}
    model = vivit.ViViT(**sizes, attention=attention)
    x = videos(2 * T, 2 * H, 2 * W)
    params = random_params(model, x, scale=0.7)["params"]

    theirs = jax.tree.map(lambda p: torch.tensor(np.asarray(p, np.float64), requires_grad=True), params)
    out = torch.stack([naive_vivit(theirs, model, each) for each in np.asarray(x)])
    (out * torch.from_numpy(parity.weights(tuple(out.shape)))).sum().backward()
    grads = jax.tree.map(lambda p: p.grad.numpy(), theirs)
    parity.check(model, {"params": params}, {"x": x}, out.detach().numpy(), grads)
    check_closely(model, {"params": params}, x, out.detach().numpy())


# Sizes and the start


@pytest.mark.parametrize(
    ("attention", "params_m", "gmacs"),
    # Arnab et al. 2021, table 2, recomputed with matrix products and convolutions alone. The figures tell
    # that models 1 and 2 have class tokens: without them they would be 451.3 and 281.8.
    [(JOINT, "88.95", 451.5), (ENCODER, "115.1", 283.3), (SELF, "117.3", 371.1), (DOT, "88.95", 276.2)],
)
def test_counts_are_the_papers(attention: str, params_m: str, gmacs: float) -> None:
    options = {"attention": attention}
    cost = table.cost(vivit.make("B/16x2", **options), vivit.inputs("B/16x2", **options))
    digits = len(params_m.partition(".")[2])
    assert f"{cost['params'] / 1e6:.{digits}f}" == params_m
    assert cost["gmacs"] == pytest.approx(gmacs, abs=0.05)
    assert cost["tokens"] == 16 * 14 * 14


@pytest.mark.parametrize("attention", [ENCODER, DOT])
def test_names_shapes_and_start_of_the_parameters(attention: Any) -> None:
    kernels = {"patch/kernel": ((2 * 2 * 2 * 3, 64), 24 + 64), **block_kernels(depth=2, width=64, heads=2)}
    tables, zeros = {"positions": (2 * 6, 64)}, {"head/kernel": (64, 7)}
    if attention == ENCODER:
        kernels |= block_kernels(depth=2, width=64, heads=2, prefix="temporal_blocks")
        tables = {"positions": (1 + 6, 64), "temporal_positions": (1 + 2, 64)}
        zeros |= {"token": (1, 64), "temporal_token": (1, 64)}
    check_start(vivit.ViViT(**{**SMALL, "width": 64}, attention=attention), kernels, tables, zeros)


# From a ViT


def test_a_video_of_one_tubelet_is_the_vits_central_or_mean_frame() -> None:
    vit, vit_params = a_vit()
    model = vivit.ViViT(**{**SMALL, "tubelet": 4}, activation="gelu")
    x = videos(4)
    start = random_params(model, x)["params"]
    for kernel, frame in (("central", x[:, 2]), ("average", jnp.mean(x, axis=1))):
        params = vivit.from_vit(model, start, vit, vit_params, kernel)
        assert_allclose(features(model, params, x), features(vit, vit_params, frame), rtol=1e-4, atol=1e-5)
        assert_array_equal(params["head"]["kernel"], start["head"]["kernel"])


def test_patch_kernels_of_a_vit_in_time() -> None:
    vit, vit_params = a_vit()
    flat = np.asarray(vit_params["patch"]["kernel"])
    for tubelet in (2, 3):
        model = vivit.ViViT(**{**SMALL, "frames": 6}, tubelet=tubelet)
        start = random_params(model, videos(6))["params"]
        central, average = (
            np.asarray(vivit.from_vit(model, start, vit, vit_params, kernel)["patch"]["kernel"])
            for kernel in ("central", "average")
        )
        frames = [np.zeros_like(flat) for _ in range(tubelet)]
        frames[1] = flat  # the second of two, or of three
        assert_array_equal(central, np.concatenate(frames))
        assert_allclose(average, np.concatenate([flat / tubelet] * tubelet), rtol=1e-6)
    model = vivit.ViViT(**SMALL, embedding="frame")
    start = random_params(model, videos())["params"]
    assert_array_equal(vivit.from_vit(model, start, vit, vit_params)["patch"]["kernel"], flat)


def test_spatial_positions_are_tiled_over_time() -> None:
    vit, vit_params = a_vit()
    tables = np.asarray(vit_params["positions"])
    for attention, times in ((JOINT, 2), (ENCODER, 1), (SELF, 2), (DOT, 2)):
        model = vivit.ViViT(**SMALL, attention=attention)
        params = vivit.from_vit(model, random_params(model, videos())["params"], vit, vit_params)
        expected = np.concatenate([tables[1:]] * times)
        if "token" in params:
            expected = np.concatenate([tables[:1], expected])
            assert_array_equal(params["token"], vit_params["token"])
        assert_array_equal(params["positions"], expected)

    model = vivit.ViViT(**{**SMALL, "resolution": (8, 6)})  # another grid than the ViT's
    params = vivit.from_vit(model, random_params(model, videos(4, 8))["params"], vit, vit_params)
    one = layers.resize_positions(vit_params["positions"][1:], (2, 3), (4, 3))
    assert_array_equal(params["positions"], np.concatenate([tables[:1], one, one]))


def test_a_vit_without_a_class_token_leaves_it_as_it_was() -> None:
    vit, vit_params = a_vit(pool="mean")
    model = vivit.ViViT(**SMALL)
    start = random_params(model, videos())["params"]
    params = vivit.from_vit(model, start, vit, vit_params)
    assert_array_equal(params["token"], start["token"])
    assert_array_equal(params["positions"][:1], start["positions"][:1])
    assert_array_equal(params["positions"][1:7], vit_params["positions"])


def test_temporal_attention_starts_as_the_identity_and_learns() -> None:
    vit, vit_params = a_vit(pool="mean")
    model = vivit.ViViT(**SMALL, attention=SELF, activation="gelu")
    x = videos()
    params = vivit.from_vit(model, random_params(model, x)["params"], vit, vit_params)
    frames = [features(vit, vit_params, x[:, i]) for i in (1, 3)]  # the central ones of two tubelets
    logits, grads = run(model, {"params": params}, x)
    head = jax.device_get(params["head"])
    expected = (frames[0] + frames[1]) / 2 @ head["kernel"] + head["bias"]
    assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(grads["params"]["blocks"]["temporal_attention"]["out"]["kernel"]).max() > 1e-3


def test_the_factorised_encoder_keeps_its_temporal_part() -> None:
    vit, vit_params = a_vit()
    model = vivit.ViViT(**SMALL, attention=ENCODER)
    start = random_params(model, videos())["params"]
    params = vivit.from_vit(model, start, vit, vit_params)
    assert set(params) == set(start)
    for name in start:
        kept = name.startswith(("temporal_", "head"))
        if kept or name in ("blocks", "norm", "token"):
            jax.tree.map(assert_array_equal, params[name], (start if kept else vit_params)[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 32}, "vit.width=32: must be that of ViViT, which is 16"),
        ({"depth": 1}, "vit.depth=1: must be that of ViViT, which is 2"),
        ({"patch": 1}, "vit.patch=1: must be that of ViViT, which is 2"),
    ],
)
def test_a_vit_that_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    vit, vit_params = a_vit(**options)
    with pytest.raises(UserError, match=message):
        vivit.from_vit(vivit.ViViT(**SMALL), {}, vit, vit_params)


def test_a_vit_without_a_table_is_named() -> None:
    vit, vit_params = a_vit()
    rest = {name: leaf for name, leaf in vit_params.items() if name != "positions"}
    with pytest.raises(UserError, match=r"vit\.positions: must be a learned table"):
        vivit.from_vit(vivit.ViViT(**SMALL), {}, vit, rest)


# Other inputs and sizes


# Of T frames, which n; read in the authors' code (scenic, common_lib/video_utils.py), to the nearest even.
FRAMES_OF = {
    (32, 16): [2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21, 23, 24, 26, 28, 30],
    (32, 8): [4, 7, 11, 14, 18, 21, 25, 28],
    (8, 4): [2, 3, 5, 6],
    (4, 4): [0, 1, 2, 3],
    (4, 1): [2],
}


@pytest.mark.parametrize(("frames", "count"), FRAMES_OF)
def test_frames_are_sampled_as_in_the_authors_code(frames: int, count: int) -> None:
    assert vivit.sampled_frames(frames, count).tolist() == FRAMES_OF[frames, count]


def test_frame_embedding_reads_one_frame_in_a_tubelet() -> None:
    x = videos(6)
    assert vivit.sampled_frames(6, 2).tolist() == [2, 4]
    frame = vivit.ViViT(**{**SMALL, "frames": 6}, tubelet=3, embedding="frame")
    tubelet = vivit.ViViT(**{**SMALL, "frames": 6}, tubelet=3)
    params = random_params(frame, x)["params"]
    kernel = params["patch"]["kernel"]
    assert kernel.shape == (2 * 2 * 3, 16)
    first = jnp.concatenate([kernel, jnp.zeros((2 * 12, 16))])
    same = {**params, "patch": {**params["patch"], "kernel": first}}
    seen = jnp.asarray(x)[:, jnp.array([2, 2, 2, 4, 4, 4])]  # the tubelets' first frames are those
    assert_allclose(features(frame, params, x), features(tubelet, same, seen), rtol=1e-4, atol=1e-5)
    assert frame.tokens(x.shape) == tubelet.tokens(x.shape) == 2 * 6


def in_time(rows: jax.Array) -> jax.Array:
    """Two moments become four, at half-pixel centres."""
    share = jnp.asarray([1, 0.75, 0.25, 0]).reshape(4, *(1,) * (rows.ndim - 1))
    return share * rows[:1] + (1 - share) * rows[1:]


def test_a_table_in_space_and_time_is_resized_in_both() -> None:
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2 * 6, 16)), jnp.float32)
    frames = [layers.resize_positions(frame, (2, 3), (4, 5)) for frame in table.reshape(2, 6, 16)]
    expected = in_time(jnp.stack(frames)).reshape(4 * 20, 16)
    assert_allclose(video.resize_grid(table, (2, 2, 3), (4, 4, 5)), expected, rtol=1e-5, atol=1e-6)
    assert_array_equal(video.resize_grid(table, (2, 2, 3), (2, 2, 3)), table)


def test_another_size_resizes_the_tables_and_nothing_else() -> None:
    model = vivit.ViViT(**SMALL, attention=ENCODER)
    params = random_params(model, videos())["params"]
    x = videos(8, 8, 10)
    made = vivit.ViViT(**{**SMALL, "frames": 8, "resolution": (8, 10)}, attention=ENCODER)
    resized = dict(params)
    for name, change in (
        ("positions", lambda rows: layers.resize_positions(rows, (2, 3), (4, 5))),
        ("temporal_positions", in_time),
    ):
        resized[name] = jnp.concatenate([params[name][:1], change(params[name][1:])])
    assert_allclose(features(model, params, x), features(made, resized, x), rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(made.init, KEY, x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)


def test_variants_and_inputs() -> None:
    model = vivit.make("L/8x4", frames=8)
    assert (model.width, model.depth, model.heads, model.patch, model.tubelet) == (1024, 24, 16, 8, 4)
    assert vivit.inputs("B/16x2")["x"].shape == (1, 32, 224, 224, 3)
    assert vivit.inputs("B/16x2", frames=8, resolution=(64, 96))["x"].shape == (1, 8, 64, 96, 3)
