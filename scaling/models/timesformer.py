"""TimeSformer with divided attention (Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video
Understanding?").

x is a video [B, T, H, W, C]; D is the width, s the number of patches per frame, N = T s that of all patches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models import variants
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
    position_grid,
    prepended,
    resize_positions,
    said_resized,
    stack,
)
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, POSITIONS, TOKEN, Blocks, Part
from scaling.models.variants import TransformerSize
from scaling.models.video import (
    from_places,
    one_video,
    resize_grid,
    spatial_positions,
    to_places,
    tubelets,
    video_grid,
)
from scaling.models.vit import ViT, check_fit

FRAMES = 8
SIZES = {  # B: section 4 of the paper, as ViT's, for Kinetics 400; then the ladder
    "B": TransformerSize(depth=12, width=768, heads=12, shape=(224, 224, 3), num_classes=400),
    **variants.LADDER,
}
VARIANTS: tuple[variants.Variant, ...] = (
    ("B/16", {}),
    ("B/16", {"frames": 16, "resolution": 448}),  # TimeSformer-HR
    ("B/16", {"frames": 96}),  # TimeSformer-L
    *((f"{size}/7", {}) for size in variants.LADDER),
)

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


class DividedBlock(nn.Module):
    """Attention along time at each place, then within each frame, then the MLP (section 3, figure 2).

    x [B, 1 + N, D] -> [B, 1 + N, D]; `frames` is T. The class token takes no part in the first attention. In
    the second, each frame attends to a copy of it, and the mean of the copies' outputs is added to it. `drop`
    is the rate of stochastic depth, which, as in the authors' code, drops the first attention for single
    places and the second for single frames.
    """

    heads: int
    frames: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    ROLES = Part(
        {
            **EncoderBlock.ROLES.names,
            "norm_temporal": NORM,
            "temporal_attention": Attention.ROLES,
            "temporal_fc": LINEAR,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array, *, drop: jax.Array | None = None) -> jax.Array:
        batch, _, width = x.shape
        token, x = x[:, :1], x[:, 1:]  # [B, 1, D], [B, N, D]
        places = x.shape[1] // self.frames

        h = to_places(layer_norm(x, "norm_temporal", epsilon=self.epsilon), self.frames)  # [B s, T, D]
        h = Attention(self.heads, dtype=self.dtype, name="temporal_attention")(h)
        h = from_places(DropPath(name="drop_temporal")(h, drop), places)  # [B, N, D]
        x = x + Dense(width, kernel_init=zeros, dtype=self.dtype, name="temporal_fc")(h)

        copies = jnp.repeat(token, self.frames, axis=1).reshape(-1, 1, width)  # [B T, 1, D]
        h = jnp.concatenate([copies, x.reshape(-1, places, width)], axis=1)  # [B T, 1 + s, D]
        h = layer_norm(h, "norm_attention", epsilon=self.epsilon)
        h = Attention(self.heads, dtype=self.dtype, name="attention")(h)
        h = DropPath(name="drop_attention")(h, drop).reshape(batch, self.frames, 1 + places, width)
        token = token + jnp.mean(h[:, :, 0], axis=1, keepdims=True)  # [B, 1, D]
        x = x + h[:, :, 1:].reshape(x.shape)  # [B, N, D]
        x = jnp.concatenate([token, x], axis=1)  # [B, 1 + N, D]

        h = layer_norm(x, "norm_mlp", epsilon=self.epsilon)
        h = Mlp(round(width * self.mlp_ratio), dtype=self.dtype, name="mlp")(h)
        x = x + DropPath(name="drop_mlp")(h, drop)
        return constrain(x, "batch", "token", "embed")


class TimeSformer(nn.Module):
    """x [B, T, H, W, C] -> logits [B, num_classes] float32.

    `frames` and `resolution`, a side or (H, W), are what the learned positions in time and space are made
    for; for inputs of another size the positions are resized, linearly in time and bicubically in space.
    Parameters are initialised as ViT's, positions in time and the projections after temporal attention at 0;
    `from_vit` copies those of a ViT.

    Raises:
        UserError: if `patch` does not divide H and W (of `resolution` too), or `heads` the width.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 400
    frames: int = FRAMES
    resolution: int | tuple[int, int] = 224
    epsilon: float = 1e-6  # epsilon of LayerNorm
    drop_path: float = 0.0  # the last block's rate of stochastic depth; it rises linearly with depth
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of patches of an input [..., T, H, W, C], without the class token."""
        return math.prod(video_grid(shape, 1, self.patch))

    def features(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: [B, T, H, W, C] -> [B, width] float32."""
        return self(x, head=False)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, *, head: bool = True) -> jax.Array:
        """Applies the model; `train` turns on stochastic depth, which draws from the "dropout" stream."""
        dtype, (t, h, w) = jnp.dtype(self.dtype), video_grid(x.shape, 1, self.patch)
        x = Dense(self.width, dtype=dtype, name="patch")(tubelets(x, 1, self.patch))  # [B, N, D]

        old = position_grid(self.resolution, self.patch)
        table = self.param("positions", normal, (1 + math.prod(old), self.width))
        time = self.param("temporal_positions", zeros, (self.frames, self.width))
        space = resize_positions(table[1:], old, (h, w))  # [s, D]
        time = resize_grid(time, (self.frames, 1, 1), (t, 1, 1))  # [T, D]
        positions = (time[:, None] + space[None]).reshape(-1, self.width)  # [N, D]
        x = x + positions.astype(dtype)[None]
        token = self.param("token", zeros, (1, self.width)) + table[:1]
        x = constrain(prepended(token, x), "batch", "token", "embed")  # [B, 1 + N, D]

        block = DividedBlock(self.heads, t, self.mlp_ratio, self.epsilon, dtype, name="blocks")
        drop = drop_rates(self.drop_path, self.depth, train)
        x = stack(block, self.depth, x, drop=drop, remat=self.remat, unroll=self.unroll)  # [B, 1 + N, D]
        x = layer_norm(x[:, 0].astype(jnp.float32), "norm", epsilon=self.epsilon)  # [B, D]
        if not head:
            return x
        return Dense(self.num_classes, kernel_init=zeros, name="head")(x)  # [B, num_classes]


def from_vit(
    model: TimeSformer, params: Mapping[str, Any], vit: ViT, vit_params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `params` of a TimeSformer with all parameters that a ViT's `vit_params` have for it.

    As in the authors' code, temporal attention and its norm become copies of the spatial ones, and the
    projection after it and the positions in time become 0. On a still video the model is then the ViT. The
    head is that of `params`.

    Raises:
        UserError: if the two models do not fit.
    """
    check_fit(model, vit, vit_params)
    sides = position_grid(model.resolution, model.patch)
    token, places = spatial_positions(vit, vit_params, sides)
    blocks = dict(vit_params["blocks"])
    blocks["temporal_attention"] = blocks["attention"]
    blocks["norm_temporal"] = blocks["norm_attention"]
    blocks["temporal_fc"] = jax.tree.map(jnp.zeros_like, params["blocks"]["temporal_fc"])
    return {
        **params,
        "patch": vit_params["patch"],
        "token": vit_params.get("token", params["token"]),
        "positions": jnp.concatenate([params["positions"][:1] if token is None else token, places]),
        "temporal_positions": jnp.zeros_like(params["temporal_positions"]),
        "blocks": blocks,
        "norm": vit_params["norm"],
    }


def make(variant: str, **options: Any) -> TimeSformer:
    """Returns the TimeSformer that `variant` names, "B/16"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch = variants.parse(variant, SIZES)
    defaults = {**size.fields(patch), "frames": FRAMES, "resolution": size.shape[0]}
    return variants.build(TimeSformer, defaults, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, T, H, W, C].

    The options `frames` and `resolution` change T, H and W.
    """
    size, _ = variants.parse(variant, SIZES)
    return one_video(size, FRAMES, options)


def resized(
    variables: Mapping[str, Any], old: TimeSformer, new: TimeSformer
) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `old` for `new`, of another length or resolution, and what was resized."""
    params, messages = dict(variables["params"]), []
    before, after = (position_grid(m.resolution, m.patch) for m in (old, new))
    if before != after:
        table = jnp.asarray(params["positions"])
        params["positions"] = resize_positions(table, before, after, extra=1)
        messages.append(said_resized("positions", before, after))
    if old.frames != new.frames:
        table = jnp.asarray(params["temporal_positions"])
        params["temporal_positions"] = resize_grid(table, (old.frames, 1, 1), (new.frames, 1, 1))
        messages.append(said_resized("temporal_positions", [old.frames], [new.frames], "frames"))
    return {**variables, "params": params}, messages


FAMILY = Family(
    module=TimeSformer,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "patch": LINEAR.at("before"),
            "token": TOKEN.at("before"),
            "positions": POSITIONS.at("before"),
            "temporal_positions": POSITIONS,
            "blocks": DividedBlock.ROLES.at(Blocks()),
            "norm": NORM.at("after"),
            "head": LINEAR.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
    from_vit=from_vit,
)
