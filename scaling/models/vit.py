"""Vision transformers, ViT (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

x is an image [B, H, W, C]; D is the width, N the number of patches.
"""

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
    Dense,
    EncoderBlock,
    Init,
    Remat,
    drop_rates,
    layer_norm,
    patch_grid,
    patchify,
    position_grid,
    prepended,
    resize_positions,
    said_resized,
    sincos_positions,
    stack,
)
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, POSITIONS, TOKEN, Blocks, Part
from scaling.models.variants import TransformerSize, side_lengths

IMAGE = (224, 224, 3)
SIZES = {  # B, L, H: table 1 of the paper; Ti, S: table 1 of DeiT (Touvron et al. 2021); then the ladder
    "Ti": TransformerSize(depth=12, width=192, heads=3, shape=IMAGE),
    "S": TransformerSize(depth=12, width=384, heads=6, shape=IMAGE),
    "B": TransformerSize(depth=12, width=768, heads=12, shape=IMAGE),
    "L": TransformerSize(depth=24, width=1024, heads=16, shape=IMAGE),
    "H": TransformerSize(depth=32, width=1280, heads=16, shape=IMAGE),
    **variants.LADDER,
}
VARIANTS: tuple[variants.Variant, ...] = (
    *((f"{size}/{patch}", {}) for size in ("Ti", "S", "B", "L", "H") for patch in (32, 16, 14, 8)),
    ("B/16", {"resolution": 384}),
    *variants.LADDER_VARIANTS,
)

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


class ViT(nn.Module):
    """x [B, H, W, C] -> logits [B, num_classes] float32.

    `pool` takes the class token or the mean of the patches, after the last norm. `resolution` is the side, or
    (H, W), that the learned position table is made for; for inputs of another size the table is resized.
    Kernels are initialised Xavier-uniform; biases, class token and head at 0; positions N(0, 0.02) or, with
    "sincos", at fixed positions, sines and cosines of row and column (Chen et al. 2021, "MoCo v3"), which
    stay fixed by a rule of the optimiser.

    Raises:
        UserError: if `patch` does not divide H and W (of `resolution` too), or `heads` the width.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    pool: Literal["token", "mean"] = "token"
    position_init: Literal["normal", "sincos"] = "normal"
    resolution: int | tuple[int, int] = 224
    epsilon: float = 1e-6  # epsilon of LayerNorm
    drop_path: float = 0.0  # the last block's rate of stochastic depth; it rises linearly with depth
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of patches of an input [..., H, W, C], without the class token."""
        return math.prod(patch_grid(shape, self.patch))

    def features(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: [B, H, W, C] -> [B, width] float32."""
        return self(x, head=False)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, *, head: bool = True) -> jax.Array:
        """Applies the model; `train` turns on stochastic depth, which draws from the "dropout" stream.

        Shapes below are those with a class token; with `pool="mean"`, 1 + N is N.
        """
        dtype, grid = jnp.dtype(self.dtype), patch_grid(x.shape, self.patch)
        extra = 1 if self.pool == "token" else 0
        x = Dense(self.width, dtype=dtype, name="patch")(patchify(x, self.patch))  # [B, N, D]
        if extra:
            x = prepended(self.param("token", zeros, (1, self.width)), x)  # [B, 1 + N, D]

        old = position_grid(self.resolution, self.patch)
        init = normal if self.position_init == "normal" else _sincos_init(old, extra)
        table = self.param("positions", init, (extra + math.prod(old), self.width))
        positions = resize_positions(table, old, grid, extra)  # [1 + N, D]
        x = constrain(x + positions.astype(dtype)[None], "batch", "token", "embed")

        block = EncoderBlock(
            self.heads, self.mlp_ratio, "gelu", epsilon=self.epsilon, dtype=dtype, name="blocks"
        )
        drop = drop_rates(self.drop_path, self.depth, train)
        x = stack(block, self.depth, x, drop=drop, remat=self.remat, unroll=self.unroll)  # [B, 1 + N, D]
        x = layer_norm(x.astype(jnp.float32), "norm", epsilon=self.epsilon)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)  # [B, D]
        if not head:
            return x
        return Dense(self.num_classes, kernel_init=zeros, name="head")(x)  # [B, num_classes]


def _sincos_init(grid: tuple[int, int], extra: int) -> Init:
    """Returns an initialiser at the fixed positions of a grid, after rows of zeros for class tokens."""
    return lambda key, shape: jnp.asarray(np.pad(sincos_positions(grid, shape[-1]), ((extra, 0), (0, 0))))


def check_fit(model: nn.Module, vit: ViT, vit_params: Mapping[str, Any]) -> None:
    """Checks that a ViT has the sizes of another family's model that is to start from it.

    Raises:
        UserError: if one of the sizes differs, or the ViT has no learned positions.
    """
    for name in ("patch", "width", "depth", "heads", "mlp_ratio"):
        expected, value = getattr(model, name), getattr(vit, name)
        if expected != value:
            raise UserError(
                f"vit.{name}={value}: must be that of {type(model).__name__}, which is {expected}"
            )
    if "positions" not in vit_params:
        raise UserError("vit.positions: must be a learned table to start from")


def make(variant: str, **options: Any) -> ViT:
    """Returns the ViT that `variant` names, e.g. "B/16"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch = variants.parse(variant, SIZES)
    return variants.build(ViT, {**size.fields(patch), "resolution": size.shape[0]}, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C]; the option `resolution` changes H and W."""
    size, _ = variants.parse(variant, SIZES)
    sides = side_lengths(options.get("resolution", size.shape[:2]))
    return {"x": jax.ShapeDtypeStruct((1, *sides, size.shape[2]), jnp.float32)}


def resized(variables: Mapping[str, Any], old: ViT, new: ViT) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `old` for `new`, which differs in resolution alone, and what was resized."""
    before, after = (position_grid(m.resolution, m.patch) for m in (old, new))
    table, extra = jnp.asarray(variables["params"]["positions"]), 1 if old.pool == "token" else 0
    params = {**variables["params"], "positions": resize_positions(table, before, after, extra)}
    return {**variables, "params": params}, [said_resized("positions", before, after)]


FAMILY = Family(
    module=ViT,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "patch": LINEAR.at("before"),
            "token": TOKEN.at("before"),
            "positions": POSITIONS.at("before"),
            "blocks": EncoderBlock.ROLES.at(Blocks()),
            "norm": NORM.at("after"),
            "head": LINEAR.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
)
