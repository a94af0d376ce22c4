"""Swin transformers (Liu et al. 2021, "Hierarchical Vision Transformer using Shifted Windows").

x is an image [B, H, W, C] or a feature map [B, h, w, D]; D is the width of a stage, M the side of a window,
N = M * M its tokens, n the number of windows.
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
from scaling.models.base import Family
from scaling.models.layers import (
    XAVIER,
    Attention,
    DropPath,
    Init,
    Kernels,
    Mlp,
    Remat,
    drop_rates,
    layer_norm,
    patch_grid,
    patchify,
    stack,
    uniform,
    unpatchify,
)
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, RELATIVE_BIAS, Blocks, Part
from scaling.models.variants import side_lengths
from scaling.models.windows import attend_in_windows, pad, relative_index, resize_relative_bias, shift_mask

DIGITS: dict[str, Any] = {
    "window": 4, "resolution": variants.DIGIT[0], "num_classes": 10, "kernel_init": "xavier"
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {  # section 3.3 of the paper
    "T": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "S": {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "B": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "L": {"width": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
}
# The ladder, for digits: two stages, of 2 x 2 windows and of one. Kernels from N(0, 0.02) are too small for
# widths so far below the paper's: with Xavier's, such a network learns more than twice as fast.
LADDER: dict[str, dict[str, Any]] = {
    name: {"width": width, "depths": (2, depth), "heads": (width // 8, width // 4), **DIGITS}
    for name, width, depth in (("A", 16, 2), ("F", 32, 2), ("P", 32, 4), ("N", 64, 4))
}
SIZES |= LADDER
LARGE: dict[str, Any] = {"resolution": 384, "window": 12}
VARIANTS: tuple[variants.Variant, ...] = (*((size, {}) for size in SIZES), ("B", LARGE), ("L", LARGE))

normal = nn.initializers.normal(0.02)
KERNELS = {"normal": Kernels(*(normal,) * 5), "xavier": XAVIER}


class WindowAttention(nn.Module):
    """Attention within windows with a relative position bias (section 3.2, equation 4).

    x [B, n, N, D], mask [n, N, N] -> [B, n, N, D]. `window` is the window that the table is made for.
    """

    heads: int
    window: int
    kernels: Kernels
    dtype: Any = jnp.float32

    ROLES = Part({**Attention.ROLES.names, "relative_bias": RELATIVE_BIAS})

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        table = self.param("relative_bias", normal, ((2 * self.window - 1) ** 2, self.heads))
        bias = table[relative_index(math.isqrt(x.shape[-2]), self.window)]  # [N, N, heads]
        bias = bias.transpose(2, 0, 1)[None]  # [1, heads, N, N]
        if mask is not None:
            bias = bias + mask[:, None]  # [n, heads, N, N]
        attention = Attention(self.heads, kernels=self.kernels, attend=attend_in_windows, dtype=self.dtype)
        nn.share_scope(self, attention)
        return attention(x, bias=bias)


class Block(nn.Module):
    """W-MSA and MLP, or with a shift SW-MSA and MLP (equation 3): [B, h, w, D] -> [B, h, w, D].

    `window` is the side of the windows, `table_window` the one that the bias table is made for.
    """

    heads: int
    window: int
    table_window: int
    kernels: Kernels
    shift: int = 0
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    ROLES = Part(
        {"norm_attention": NORM, "attention": WindowAttention.ROLES, "norm_mlp": NORM, "mlp": Mlp.ROLES}
    )

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, drop: jax.Array | None) -> jax.Array:
        batch, height, width, channels = x.shape
        h = pad(layer_norm(x, "norm_attention", epsilon=self.epsilon), self.window)  # [B, h', w', D]
        grid = patch_grid(h.shape, self.window)
        h = jnp.roll(h, (-self.shift, -self.shift), (1, 2))
        h = patchify(h, self.window).reshape(batch, math.prod(grid), self.window**2, channels)  # [B, n, N, D]
        h = WindowAttention(self.heads, self.table_window, self.kernels, self.dtype, name="attention")(
            h, mask
        )
        h = unpatchify(h.reshape(batch, math.prod(grid), -1), grid, self.window)  # [B, h', w', D]
        h = jnp.roll(h, (self.shift, self.shift), (1, 2))[:, :height, :width]  # [B, h, w, D]
        x = x + DropPath(name="drop_attention")(h, drop)
        h = layer_norm(x, "norm_mlp", epsilon=self.epsilon)
        h = Mlp(round(channels * self.mlp_ratio), kernels=self.kernels, dtype=self.dtype, name="mlp")(h)
        x = x + DropPath(name="drop_mlp")(h, drop)
        return constrain(x, "batch", None, None, "embed")


class BlockPair(nn.Module):
    """A block with plain windows, then one with shifted windows (figure 3b): [B, h, w, D] -> [B, h, w, D].

    `mask` is the second block's, `drop` [2] are the rates of stochastic depth.
    """

    heads: int
    window: int
    table_window: int
    kernels: Kernels
    shift: int
    mlp_ratio: float = 4.0
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    ROLES = Part({"plain": Block.ROLES.at(Blocks(step=2)), "shifted": Block.ROLES.at(Blocks(1, step=2))})

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, drop: jax.Array | None = None
    ) -> jax.Array:
        first, second = (None, None) if drop is None else (drop[0], drop[1])
        block = functools.partial(
            Block,
            self.heads,
            self.window,
            self.table_window,
            self.kernels,
            mlp_ratio=self.mlp_ratio,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = block(name="plain")(x, None, first)  # [B, h, w, D]
        return block(shift=self.shift, name="shifted")(x, mask, second)  # [B, h, w, D]


class PatchMerging(nn.Module):
    """A layer that merges each 2x2 tokens and halves channels: [B, h, w, D] -> [B, h / 2, w / 2, 2D]."""

    kernel_init: Init
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    ROLES = Part({"norm": NORM, "reduction": LINEAR})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, x = x.shape[-1], pad(x, 2)
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]  # 00, 10, 01, 11
        x = layer_norm(jnp.concatenate(corners, -1), "norm", epsilon=self.epsilon)  # [B, h / 2, w / 2, 4D]
        reduction = nn.Dense(
            2 * width, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="reduction"
        )
        return reduction(x)


class Swin(nn.Module):
    """x [B, H, W, C] -> logits [B, num_classes] float32, for any H and W.

    Stage s has `depths[s]` blocks of width `width` * 2^s with `heads[s]` heads, in windows of `window` tokens
    per side, shifted by half a window in every second block. Sides that a patch, a window or a merging does
    not divide are padded with zeros. If a stage's map is not larger than the window, the window is the map's
    shorter side, and nothing is shifted. `resolution`, the side or (H, W), is an input's size unless another
    is given; no parameter depends on it. Linear kernels and bias tables are initialised N(0, 0.02), kernels
    Xavier-uniform with `kernel_init` "xavier".

    Raises:
        UserError: if a depth is odd, or `heads` are not one number per stage or do not divide its width.
    """

    patch: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    resolution: int | tuple[int, int] = 224
    epsilon: float = 1e-5  # epsilon of LayerNorm
    drop_path: float = 0.0  # the last block's rate of stochastic depth; it rises linearly over all stages
    kernel_init: Literal["normal", "xavier"] = "normal"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of patches of an input [..., H, W, C]: the tokens of the first stage."""
        return math.prod(-(-side // self.patch) for side in shape[-3:-1])

    def features(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: [B, H, W, C] -> [B, the last stage's width] float32."""
        return self(x, output="features")

    def feature_maps(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the output of each stage, float32.

        [B, H, W, C] -> [B, H / 4, W / 4, D], [B, H / 8, W / 8, 2D], ...
        """
        return self(x, output="feature_maps")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        output: Literal["logits", "features", "feature_maps"] = "logits",
    ) -> Any:
        """Applies the model; `train` turns on stochastic depth, which draws from the "dropout" stream."""
        self._check()
        dtype, x = jnp.dtype(self.dtype), pad(x, self.patch)  # [B, H, W, C]
        grid = patch_grid(x.shape, self.patch)
        init = uniform((self.patch**2 * x.shape[-1]) ** -0.5)  # PyTorch's initialisation of a convolution
        kernels = KERNELS[self.kernel_init]
        embed = nn.Dense(self.width, kernel_init=init, bias_init=init, dtype=dtype, name="patch")
        x = embed(patchify(x, self.patch))  # [B, H / 4 * W / 4, D]
        x = layer_norm(x, "norm_patch", epsilon=self.epsilon).reshape(x.shape[0], *grid, self.width)

        rates, maps = drop_rates(self.drop_path, sum(self.depths), train), []
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if stage > 0:
                x = PatchMerging(kernels.up, self.epsilon, dtype, name=f"merging{stage + 1}")(x)
            first = sum(self.depths[:stage])
            drop = None if rates is None else rates[first : first + depth].reshape(-1, 2)
            x = self._apply_stage(x, f"stage{stage + 1}", depth, heads, drop)  # [B, h, w, D]
            maps.append(x.astype(jnp.float32))
        if output == "feature_maps":
            return tuple(maps)
        x = layer_norm(maps[-1], "norm", epsilon=self.epsilon)
        x = jnp.mean(x, axis=(1, 2))  # [B, D]
        if output == "features":
            return x
        return nn.Dense(self.num_classes, kernel_init=kernels.up, name="head")(x)  # [B, num_classes]

    def _apply_stage(
        self, x: jax.Array, name: str, depth: int, heads: int, drop: jax.Array | None
    ) -> jax.Array:
        height, width = x.shape[1:3]
        fits_window = min(height, width) <= self.window
        window, shift = (min(height, width), 0) if fits_window else (self.window, self.window // 2)
        pair = BlockPair(
            heads,
            window,
            self.window,
            KERNELS[self.kernel_init],
            shift,
            mlp_ratio=self.mlp_ratio,
            epsilon=self.epsilon,
            dtype=jnp.dtype(self.dtype),
            name=name,
        )
        mask = [jnp.asarray(shift_mask(height, width, window, shift))] if shift else []
        return stack(pair, depth // 2, x, *mask, drop=drop, remat=self.remat, unroll=self.unroll)

    def _check(self) -> None:
        if not self.depths or any(depth <= 0 or depth % 2 for depth in self.depths):
            raise UserError(
                f"depths={self.depths}: must be even and positive, as a shifted block follows each plain one"
            )
        if len(self.heads) != len(self.depths) or any(heads <= 0 for heads in self.heads):
            raise UserError(
                f"heads={self.heads}: must be one positive number for each of depths={self.depths}"
            )


def make(variant: str, **options: Any) -> Swin:
    """Returns the Swin that `variant` names, e.g. "T"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    return variants.build(Swin, _size(variant), options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C]; the option `resolution` changes H and W."""
    size = _size(variant)
    sides = side_lengths(options.get("resolution", size.get("resolution", Swin.resolution)))
    channels = variants.DIGIT[2] if variant in LADDER else 3
    return {"x": jax.ShapeDtypeStruct((1, *sides, channels), jnp.float32)}


def resized(variables: Mapping[str, Any], source: Swin, target: Swin) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `source` for the window of `target`, and what was resized."""

    def resize(path: tuple[Any, ...], leaf: Any) -> Any:
        if path[-1].key != "relative_bias":
            return leaf
        return np.stack([resize_relative_bias(table, source.window, target.window) for table in leaf])

    if source.window == target.window:
        return dict(variables), []
    message = f"relative_bias: resized from windows of {source.window} to windows of {target.window}"
    return jax.tree_util.tree_map_with_path(resize, dict(variables)), [message]


def _size(variant: str) -> dict[str, Any]:
    if variant not in SIZES:
        raise UserError(f"model.variant={variant!r}: must be one of {', '.join(SIZES)}")
    return SIZES[variant]


FAMILY = Family(
    module=Swin,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "patch": LINEAR.at("before"),
            "norm_patch": NORM.at("before"),
            "stage#": BlockPair.ROLES,
            "merging#": PatchMerging.ROLES.at("between"),
            "norm": NORM.at("after"),
            "head": LINEAR.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
)
