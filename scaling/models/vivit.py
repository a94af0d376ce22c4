"""Video vision transformers, ViViT (Arnab et al. 2021, "ViViT: A Video Vision Transformer").

x is a video [B, T, H, W, C]; D is the width. Tokens stand on a grid of t x h x w, time slowest; s = h w is
the number of places in a frame, and N = t s that of all tokens.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.attention import dot_product_attention
from scaling.models.base import Family
from scaling.models.layers import (
    Attention,
    Dense,
    DropPath,
    EncoderBlock,
    Mlp,
    Remat,
    drop_rates,
    layer_norm,
    prepended,
    said_resized,
    stack,
)
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, POSITIONS, TOKEN, Blocks, Part
from scaling.models.variants import TransformerSize, side_lengths
from scaling.models.video import (
    Grid,
    from_places,
    one_video,
    resize_grid,
    size_frames,
    spatial_positions,
    to_places,
    tubelets,
    video_grid,
)
from scaling.models.vit import ViT, check_fit

Factorisation = Literal[
    "joint", "factorised-encoder", "factorised-self-attention", "factorised-dot-product"
]  # models 1, 2, 3 and 4 of the paper

FRAMES, IMAGE, CLASSES = 32, (224, 224, 3), 400  # frames, [H, W, C] and classes for Kinetics 400
SIZES = {  # B, L: section 4.1 of the paper, as ViT's; then the ladder
    "B": TransformerSize(depth=12, width=768, heads=12, shape=IMAGE, num_classes=CLASSES),
    "L": TransformerSize(depth=24, width=1024, heads=16, shape=IMAGE, num_classes=CLASSES),
    **variants.LADDER,
}
FACTORISED: tuple[dict[str, Any], ...] = (
    {"attention": "factorised-encoder"},
    {"attention": "factorised-self-attention"},
    {"attention": "factorised-dot-product"},
)
VARIANTS: tuple[variants.Variant, ...] = (
    *((f"{size}/16x2", options) for size in ("B", "L") for options in ({}, *FACTORISED)),
    *((f"{size}/{patch}x2", {}) for size in variants.LADDER for patch in (14, 7, 4)),
    *(("P/7x2", options) for options in FACTORISED),
)

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


# Blocks of models 3 and 4; those of models 1 and 2 are ViT's


class FactorisedSelfAttentionBlock(nn.Module):
    """Attention within each frame, then along time at each place, then the MLP (equations 4 to 6).

    x [B, N, D] -> [B, N, D]; `frames` is t, `drop` the rate of stochastic depth.
    """

    heads: int
    frames: int
    mlp_ratio: float = 4.0
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    ROLES = Part({**EncoderBlock.ROLES.names, "norm_temporal": NORM, "temporal_attention": Attention.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array, *, drop: jax.Array | None = None) -> jax.Array:
        _, tokens, width = x.shape
        places, hidden = tokens // self.frames, round(width * self.mlp_ratio)
        h = layer_norm(x, "norm_attention", epsilon=self.epsilon).reshape(-1, places, width)  # [B t, s, D]
        h = Attention(self.heads, dtype=self.dtype, name="attention")(h).reshape(x.shape)  # [B, N, D]
        x = x + DropPath(name="drop_attention")(h, drop)
        h = to_places(layer_norm(x, "norm_temporal", epsilon=self.epsilon), self.frames)  # [B s, t, D]
        h = Attention(self.heads, dtype=self.dtype, name="temporal_attention")(h)
        x = x + DropPath(name="drop_temporal")(from_places(h, places), drop)  # [B, N, D]
        h = layer_norm(x, "norm_mlp", epsilon=self.epsilon)
        h = Mlp(hidden, self.activation, dtype=self.dtype, name="mlp")(h)
        x = x + DropPath(name="drop_mlp")(h, drop)
        return constrain(x, "batch", "token", "embed")


def factorised_dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    scale: float | None = None,
    *,
    frames: int,
) -> jax.Array:
    """Applies half of the heads along time at each place, the other half within each frame (section 3.3).

    `dot_product_attention` of q, k, v [B, N, heads, d] -> [B, N, heads, d]; `frames` is t. The first half of
    the heads is time's, as in the authors' code; the paper leaves it open.

    Raises:
        UserError: if the number of heads is odd.
    """
    _, tokens, heads, head_width = q.shape
    if heads % 2:
        raise UserError(f"heads={heads}: must be even, as half of them attend along time")
    half, places = heads // 2, tokens // frames
    qt, kt, vt = (to_places(each[:, :, :half], frames) for each in (q, k, v))  # [B s, t, heads / 2, d]
    by_frame = (-1, places, half, head_width)
    qs, ks, vs = (each[:, :, half:].reshape(by_frame) for each in (q, k, v))  # [B t, s, heads / 2, d]
    time = from_places(dot_product_attention(qt, kt, vt, bias, scale), places)  # [B, N, heads / 2, d]
    space = dot_product_attention(qs, ks, vs, bias, scale).reshape(time.shape)
    return jnp.concatenate([time, space], axis=2)


# Models


def sampled_frames(frames: int, count: int) -> np.ndarray:
    """Returns the `count` of a clip's frames that uniform frame sampling takes (section 3.2): [count] ints.

    They are spaced as in the authors' code: the k-th, from 1, is k * frames / (count + 1), to the nearest.
    """
    if count == frames:
        return np.arange(frames)
    times = np.arange(1, count + 1) * frames / (count + 1)
    return np.minimum(np.round(times).astype(np.int64), frames - 1)


class ViViT(nn.Module):
    """x [B, T, H, W, C] -> logits [B, num_classes] float32 (section 3.3).

    `attention` names the model of the paper: "joint" attention over all tokens (1); "factorised-encoder", a
    spatial encoder for each tubelet of time and a temporal one, of `temporal_depth`, over their class tokens
    (2); "factorised-self-attention" (3); or "factorised-dot-product" attention (4). The head reads the class
    token in models 1 and 2, and the mean of all tokens in models 3 and 4, which have no class token.

    `embedding` embeds tubelets of `tubelet` frames, or as many single frames, evenly spaced. `frames` and
    `resolution`, a side or (H, W), are what the learned positions are made for; for inputs of another size
    the positions are resized. `activation` is the authors', GELU's tanh form. Parameters are initialised as
    ViT's; `from_vit` copies those of a ViT.

    Raises:
        UserError: if `tubelet` does not divide T, `patch` does not divide H and W, or those of `frames` and
            `resolution`, or `heads` does not divide the width.
    """

    patch: int = 16
    tubelet: int = 2
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = CLASSES
    attention: Factorisation = "joint"
    temporal_depth: int = 4
    embedding: Literal["tubelet", "frame"] = "tubelet"
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    frames: int = FRAMES
    resolution: int | tuple[int, int] = 224
    epsilon: float = 1e-6  # epsilon of LayerNorm
    drop_path: float = 0.0  # the last block's rate of stochastic depth; it rises linearly with depth
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def grid(self) -> Grid:
        """Returns (t, h, w) of the videos that the positions are made for."""
        return video_grid((self.frames, *side_lengths(self.resolution), 1), self.tubelet, self.patch)

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of tokens of an input [..., T, H, W, C], without class tokens."""
        return math.prod(video_grid(shape, self.tubelet, self.patch))

    def features(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: [B, T, H, W, C] -> [B, width] float32."""
        return self(x, head=False)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, *, head: bool = True) -> jax.Array:
        """Applies the model; `train` turns on stochastic depth, which draws from the "dropout" stream.

        In model 2, branches of the spatial encoder are dropped for single tubelets of time.
        """
        dtype, old = jnp.dtype(self.dtype), self.grid()
        new = t, h, w = video_grid(x.shape, self.tubelet, self.patch)
        x = tubelets(x, self.tubelet, self.patch) if self.embedding == "tubelet" else self._sample_patches(x)
        x = Dense(self.width, dtype=dtype, name="patch")(x)  # [B, N, D]

        block: dict[str, Any] = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, activation=self.activation)
        block |= dict(epsilon=self.epsilon, dtype=dtype)
        if self.attention == "joint":
            x = self._add_positions(x, old, new, token=True)  # [B, 1 + N, D]
            joint = EncoderBlock(**block, tokens="space_time", name="blocks")
            x = self._encode(joint, self.depth, x, train)[:, 0]
        elif self.attention == "factorised-encoder":
            x = x.reshape(-1, h * w, self.width)  # [B t, s, D]
            x = self._add_positions(x, (1, *old[1:]), (1, h, w), token=True)  # [B t, 1 + s, D]
            x = self._encode(EncoderBlock(**block, name="blocks"), self.depth, x, train)[:, 0]
            x = x.reshape(-1, t, self.width).astype(dtype)  # [B, t, D]
            old_times, new_times = (old[0], 1, 1), (t, 1, 1)
            x = self._add_positions(x, old_times, new_times, token=True, prefix="temporal_")  # [B, 1 + t, D]
            temporal = EncoderBlock(**block, name="temporal_blocks")
            x = self._encode(temporal, self.temporal_depth, x, train, prefix="temporal_")[:, 0]
        else:
            x = self._add_positions(x, old, new, token=False)  # [B, N, D]
            if self.attention == "factorised-self-attention":
                factorised: nn.Module = FactorisedSelfAttentionBlock(**block, frames=t, name="blocks")
            else:
                attend = functools.partial(factorised_dot_product, frames=t)
                factorised = EncoderBlock(**block, attend=attend, name="blocks")
            x = jnp.mean(self._encode(factorised, self.depth, x, train), axis=1)
        if not head:
            return x  # [B, D]
        return Dense(self.num_classes, kernel_init=zeros, name="head")(x)  # [B, num_classes]

    def _sample_patches(self, x: jax.Array) -> jax.Array:
        """Splits `sampled_frames` into patches: [B, T, H, W, C] -> [B, N, patch * patch * C]."""
        frames = x.shape[1]
        return tubelets(x[:, sampled_frames(frames, frames // self.tubelet)], 1, self.patch)

    def _add_positions(
        self, x: jax.Array, old: Grid, new: Grid, *, token: bool, prefix: str = ""
    ) -> jax.Array:
        """Adds learned positions to x [B, N, D], after prepending a class token if `token`."""
        extra = 1 if token else 0
        if token:
            x = prepended(self.param(f"{prefix}token", zeros, (1, self.width)), x)  # [B, 1 + N, D]
        table = self.param(f"{prefix}positions", normal, (extra + math.prod(old), self.width))
        positions = resize_grid(table, old, new, extra)  # [1 + N, D]
        return constrain(x + positions.astype(x.dtype)[None], "batch", "token", "embed")

    def _encode(
        self, block: nn.Module, depth: int, x: jax.Array, train: bool, *, prefix: str = ""
    ) -> jax.Array:
        """Applies `depth` blocks and the last norm: [B, N, D] -> [B, N, D] float32."""
        drop = drop_rates(self.drop_path, depth, train)
        x = stack(block, depth, x, drop=drop, remat=self.remat, unroll=self.unroll)
        return layer_norm(x.astype(jnp.float32), f"{prefix}norm", epsilon=self.epsilon)


def from_vit(
    model: ViViT,
    params: Mapping[str, Any],
    vit: ViT,
    vit_params: Mapping[str, Any],
    kernel: Literal["central", "average"] = "central",
) -> dict[str, Any]:
    """Returns `params` of a ViViT with all parameters that a ViT's `vit_params` have for it (section 3.4).

    The patch kernel of tubelets is the ViT's at frame tubelet // 2 and 0 at the others ("central"), or the
    ViT's / tubelet at every frame ("average"). Spatial positions are resized to the new grid and tiled over
    time. Parameters that a ViT lacks are those of `params`: the head, model 2's temporal encoder, and model
    3's temporal attention except its last projection, which becomes 0, so that equation 5 is the identity at
    first. (The paper sets all of that attention to 0, but then no gradient ever reaches its kernels.)

    Raises:
        UserError: if the two models do not fit.
    """
    check_fit(model, vit, vit_params)
    params = {**params, "norm": vit_params["norm"]}
    flat = vit_params["patch"]["kernel"]  # [patch * patch * C, D]
    if model.embedding == "tubelet":
        if kernel == "central":
            frames = jnp.zeros((model.tubelet, *flat.shape), flat.dtype).at[model.tubelet // 2].set(flat)
        else:
            frames = jnp.tile(flat[None] / model.tubelet, (model.tubelet, 1, 1))
        flat = frames.reshape(-1, flat.shape[-1])
    params["patch"] = {"kernel": flat, "bias": vit_params["patch"]["bias"]}

    blocks = dict(vit_params["blocks"])
    if model.attention == "factorised-self-attention":
        temporal = dict(params["blocks"]["temporal_attention"])
        temporal["out"] = jax.tree.map(jnp.zeros_like, temporal["out"])
        blocks |= {"norm_temporal": params["blocks"]["norm_temporal"], "temporal_attention": temporal}
    params["blocks"] = blocks

    token, places = spatial_positions(vit, vit_params, model.grid()[1:])
    times = 1 if model.attention == "factorised-encoder" else model.grid()[0]
    positions = jnp.tile(places, (times, 1))  # [t s, D]
    if "token" in params:
        positions = jnp.concatenate([params["positions"][:1] if token is None else token, positions])
        params["token"] = vit_params.get("token", params["token"])
    params["positions"] = positions
    return params


def make(variant: str, **options: Any) -> ViViT:
    """Returns the ViViT that `variant` names, e.g. "B/16x2"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch, tubelet = parse(variant)
    defaults = {**size.fields(patch), "tubelet": tubelet, "frames": size_frames(size, FRAMES)}
    defaults["resolution"] = size.shape[0]
    return variants.build(ViViT, defaults, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, T, H, W, C].

    The options `frames` and `resolution` change T, H and W.
    """
    size, _, _ = parse(variant)
    return one_video(size, size_frames(size, FRAMES), options)


def resized(variables: Mapping[str, Any], old: ViViT, new: ViViT) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `old` for `new`, of another length or resolution, and what was resized."""
    params, before, after = dict(variables["params"]), old.grid(), new.grid()
    tables: dict[str, tuple[Grid, Grid]] = {"positions": (before, after)}
    if old.attention == "factorised-encoder":  # one table for places, another for time
        tables = {
            "positions": ((1, *before[1:]), (1, *after[1:])),
            "temporal_positions": ((before[0], 1, 1), (after[0], 1, 1)),
        }
    messages = []
    for name, grids in tables.items():
        if grids[0] != grids[1]:
            table = jnp.asarray(params[name])
            extra = len(table) - math.prod(grids[0])  # 1 if there is a class token
            params[name] = resize_grid(table, *grids, extra)
            messages.append(said_resized(name, *grids, "tokens"))
    return {**variables, "params": params}, messages


def parse(variant: str) -> tuple[TransformerSize, int, int]:
    """Returns the size, the patch and the tubelet that `variant` names.

    Raises:
        UserError: if the variant is not SIZE/PATCHxTUBELET, or there is no such size.
    """
    name, _, sides = variant.partition("/")
    patch, _, tubelet = sides.partition("x")
    if name not in SIZES or not all(side.isdecimal() and int(side) for side in (patch, tubelet)):
        raise UserError(
            f"model.variant={variant!r}: must be SIZE/PATCHxTUBELET with a SIZE of {', '.join(SIZES)}"
        )
    return SIZES[name], int(patch), int(tubelet)


FAMILY = Family(
    module=ViViT,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "patch": LINEAR.at("before"),
            "token": TOKEN.at("before"),
            "positions": POSITIONS.at("before"),
            "blocks": FactorisedSelfAttentionBlock.ROLES.at(Blocks()),
            "norm": NORM.at("after"),
            "temporal_token": TOKEN,
            "temporal_positions": POSITIONS,
            "temporal_blocks": EncoderBlock.ROLES.at(Blocks()),
            "temporal_norm": NORM,
            "head": LINEAR.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
    from_vit=from_vit,
)
