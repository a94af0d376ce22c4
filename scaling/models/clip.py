"""CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision").

x is an image [B, H, W, C], text [B, N] token ids; D is a tower's width, E that of the joint embedding.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.base import Family
from scaling.models.clip_resnet import STRIDE, ModifiedResNet, learned_positions
from scaling.models.layers import (
    EncoderBlock,
    Remat,
    fan_in_uniform,
    layer_norm,
    patch_grid,
    patchify,
    position_grid,
    prepended,
    resize_positions,
    said_resized,
)
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, POSITIONS, SCALAR, TOKEN, Blocks, Part, merged
from scaling.models.text import TextTransformer, end_of_text, normal, run_blocks
from scaling.models.vit import ViT, check_fit

CONTEXT = 77  # tokens of a text, including those of its start and end


@dataclasses.dataclass(frozen=True)
class CLIPSize:
    """A row of the paper's tables, in which all text transformers have depth 12."""

    embed_dim: int
    resolution: int
    depth: int | tuple[int, int, int, int]  # a ViT's blocks, or a modified ResNet's in each stage
    width: int
    heads: int
    text_width: int
    text_heads: int
    text_depth: int = 12
    vocabulary: int = 49408
    context: int = CONTEXT


def small(depth: int, width: int) -> CLIPSize:
    """Returns a row of the ladder: two equal towers, with heads of width 8, as in the ViT's ladder."""
    heads = width // 8
    return CLIPSize(64, 32, depth, width, heads, width, heads, text_depth=depth, vocabulary=1024, context=16)


SIZES = {  # RN: table 19 of the paper, with heads 64 wide; ViT: table 20
    "RN50": CLIPSize(1024, 224, (3, 4, 6, 3), 2048, 32, text_width=512, text_heads=8),
    "RN101": CLIPSize(512, 224, (3, 4, 23, 3), 2048, 32, text_width=512, text_heads=8),
    "RN50x4": CLIPSize(640, 288, (4, 6, 10, 6), 2560, 40, text_width=640, text_heads=10),
    "RN50x16": CLIPSize(768, 384, (6, 8, 18, 8), 3072, 48, text_width=768, text_heads=12),
    "RN50x64": CLIPSize(1024, 448, (3, 15, 36, 10), 4096, 64, text_width=1024, text_heads=16),
    "ViT-B": CLIPSize(512, 224, 12, 768, 12, text_width=512, text_heads=8),
    "ViT-L": CLIPSize(768, 224, 24, 1024, 16, text_width=768, text_heads=12),
    # For drawings of 32 pixels with short captions, on a laptop.
    "ViT-F": small(depth=2, width=32),
    "ViT-P": small(depth=4, width=32),
    "ViT-N": small(depth=4, width=64),
}
VARIANTS: tuple[variants.Variant, ...] = (
    *((name, {}) for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")),
    *((name, {}) for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14")),
    ("ViT-L/14", {"resolution": 336}),
    *((f"{name}/{patch}", {}) for name in ("ViT-F", "ViT-P", "ViT-N") for patch in (16, 8, 4)),
)
LARGEST_SCALE = 100.0  # largest scale of the logits (section 2.5)


class VisionTransformer(nn.Module):
    """x [B, H, W, C] -> features [B, features] float32: a ViT with one more norm before the blocks.

    Class token, positions and projection are initialised N(0, 1 / D), the patch kernel within
    1 / sqrt(fan in), the blocks as in the text transformer. The position table is made for `resolution`, and
    resized for inputs of another size.

    Raises:
        UserError: if `patch` does not divide H, W and `resolution`, or `heads` the width.
    """

    features: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    resolution: int
    activation: str
    epsilon: float
    pre_norm: bool = True
    dtype: Any = jnp.float32
    remat: Remat = "none"
    unroll: bool = False

    ROLES = Part(
        {
            "patch": LINEAR,
            "token": TOKEN,
            "positions": POSITIONS,
            "norm_pre": NORM,
            "blocks": EncoderBlock.ROLES.at(Blocks()),
            "norm": NORM,
            "projection": LINEAR,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        grid = patch_grid(x.shape, self.patch)
        old = position_grid(self.resolution, self.patch)
        init = normal(self.width**-0.5)
        embed = nn.Dense(
            self.width, use_bias=False, kernel_init=fan_in_uniform, dtype=self.dtype, name="patch"
        )
        x = embed(patchify(x, self.patch))  # [B, N, D]
        x = prepended(self.param("token", init, (1, self.width)), x)  # [B, 1 + N, D]
        x = x + learned_positions(self, old, grid, self.width).astype(self.dtype)[None]
        if self.pre_norm:
            x = layer_norm(x, "norm_pre", epsilon=self.epsilon)
        x = constrain(x, "batch", "token", "embed")

        x = run_blocks(self, x)  # [B, 1 + N, D]
        x = layer_norm(x[:, 0].astype(jnp.float32), "norm", epsilon=self.epsilon)  # [B, D]
        return nn.Dense(self.features, use_bias=False, kernel_init=init, name="projection")(x)


class Embeddings(NamedTuple):
    """Inputs of the contrastive loss, whose logits are scale * image @ text.T (figure 3), plus the bias."""

    image: jax.Array  # [B, E], of length 1
    text: jax.Array  # [B, E], of length 1
    scale: jax.Array  # []
    bias: jax.Array | None = None  # []


class CLIP(nn.Module):
    """x [B, H, W, C], text [B, N] int32 -> Embeddings, float32.

    The image tower is a ViT, or with `patch=None` the modified ResNet, whose `depth` are the blocks of its
    four stages. A text's features are those at its greatest token id, which must be the end of text. The
    scale of the logits is exp(logit_scale) and is initialised at 1 / 0.07 (section 2.5); `bounded` keeps it
    at most 100. With `logit_bias`, for the sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, section 3.2),
    the scale has no bound and is initialised at 10, and a bias that is added to the logits at -10.

    Raises:
        UserError: if `patch` and `depth` do not name one of the towers, or as the towers do.
    """

    patch: int | None = 32
    width: int = 768
    depth: int | tuple[int, int, int, int] = 12
    heads: int = 12
    mlp_ratio: float = 4.0  # width of the MLP over that of both transformers
    resolution: int = 224
    embed_dim: int = 512
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    vocabulary: int = 49408
    context: int = CONTEXT
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # in both; gelu in models by others than OpenAI
    epsilon: float = 1e-5  # epsilon of LayerNorm
    logit_bias: bool = False
    pre_norm: bool = True  # the ViT's norm before its blocks; a classifier has none (`from_vit`)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int | None:
        """Returns the number of patches of an image [..., H, W, C], or None for the modified ResNet."""
        return None if self.patch is None else math.prod(patch_grid(shape, self.patch))

    def setup(self) -> None:
        repeat: dict[str, Any] = dict(dtype=jnp.dtype(self.dtype), remat=self.remat, unroll=self.unroll)
        transformer: dict[str, Any] = dict(
            mlp_ratio=self.mlp_ratio, activation=self.activation, epsilon=self.epsilon, **repeat
        )
        self.image = self._image_tower(repeat, transformer)
        self.text = TextTransformer(
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            vocabulary=self.vocabulary,
            context=self.context,
            **transformer,
        )
        init = normal(self.text_width**-0.5)
        self.text_projection = nn.Dense(self.embed_dim, use_bias=False, kernel_init=init)
        scale = 10.0 if self.logit_bias else 1 / 0.07
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(scale)), ())
        if self.logit_bias:
            self.added_bias = self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def _image_tower(self, repeat: dict[str, Any], transformer: dict[str, Any]) -> Any:
        tower: dict[str, Any] = dict(
            features=self.embed_dim,
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            resolution=self.resolution,
        )
        if self.patch is None and isinstance(self.depth, tuple):
            return ModifiedResNet(**tower, **repeat)
        if self.patch is not None and isinstance(self.depth, int):
            return VisionTransformer(patch=self.patch, pre_norm=self.pre_norm, **tower, **transformer)
        raise UserError(
            f"patch={self.patch}, depth={self.depth}: must be two integers for a ViT, or None and the blocks "
            f"of four stages for a modified ResNet"
        )

    def features(self, x: jax.Array) -> jax.Array:
        """Returns image features: [B, H, W, C] -> [B, E] float32, of any length."""
        return self.image_features(x)

    def image_features(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns image features: [B, H, W, C] -> [B, E] float32, of any length.

        With `train`, BatchNorm uses the batch's statistics.
        """
        return self.image(x) if self.patch else self.image(x, train)

    def text_features(self, text: jax.Array) -> jax.Array:
        """Returns text features: [B, N] int32 -> [B, E] float32, of any length."""
        return self.text_projection(end_of_text(self.text(text), text))

    def scale(self) -> jax.Array:
        """Returns the scale of the logits, []."""
        return jnp.exp(self.logit_scale)

    def __call__(self, x: jax.Array, text: jax.Array, train: bool = False) -> Embeddings:
        image, words = self.image_features(x, train), self.text_features(text)  # [B, E] each
        bias = self.added_bias if self.logit_bias else None
        return Embeddings(unit(image), unit(words), self.scale(), bias)


def bounded(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with the scale of the logits clipped to [1, 100], as after each training step.

    As in section 2.5 and in the training of OpenAI and open_clip, the parameter is clipped, and never its
    gradient, so that it can come down again.
    """
    return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(LARGEST_SCALE))}


def unit(x: jax.Array) -> jax.Array:
    """Divides x [..., E] by its length."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def from_vit(
    model: CLIP, params: Mapping[str, Any], vit: ViT, vit_params: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `params` with a trained ViT as the image tower, which then gives the ViT's features.

    This is for locked-image tuning (Zhai et al. 2022, arXiv:2111.07991). The bias of the ViT's patches is
    added to their positions, which are resized if the resolution differs. Other parameters are unchanged.

    Raises:
        UserError: if the ViT does not fit the tower.
    """
    check_fit(model, vit, vit_params)
    if vit.pool != "token":
        raise UserError("vit.pool='mean': must be 'token'; train it with --config.model.pool=token")
    for key, value in {"pre_norm": False, "activation": "gelu", "epsilon": vit.epsilon}.items():
        if getattr(model, key) != value:
            raise UserError(f"model.{key}={getattr(model, key)}: must be {value}, as the ViT has it")
    old, new = (position_grid(m.resolution, vit.patch) for m in (vit, model))
    positions = resize_positions(jnp.asarray(vit_params["positions"]), old, new, extra=1)
    tower = {
        "patch": {"kernel": vit_params["patch"]["kernel"]},
        "positions": positions.at[1:].add(vit_params["patch"]["bias"][None]),
        **{name: vit_params[name] for name in ("token", "blocks", "norm")},
    }
    return {**params, "image": {**params["image"], **tower}}


def make(variant: str, **options: Any) -> CLIP:
    """Returns the CLIP that `variant` names, e.g. "ViT-B/32" or "RN50"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch = _parse(variant)
    return variants.build(CLIP, {**dataclasses.asdict(size), "patch": patch}, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C], text [1, N].

    The options `resolution` and `context` change them.
    """
    size, _ = _parse(variant)
    side = options.get("resolution", size.resolution)
    return {
        "x": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, options.get("context", size.context)), jnp.int32),
    }


def resized(variables: Mapping[str, Any], old: CLIP, new: CLIP) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `old` for `new`, which differs in resolution alone, and what was resized."""
    before, after = (position_grid(m.resolution, m.patch or STRIDE) for m in (old, new))
    path = "image/positions" if old.patch else "image/pool/positions"
    flat = flatten_dict(variables["params"], sep="/")
    flat[path] = resize_positions(jnp.asarray(flat[path]), before, after, extra=1)
    return {**variables, "params": unflatten_dict(flat, sep="/")}, [said_resized(path, before, after)]


def _parse(variant: str) -> tuple[CLIPSize, int | None]:
    name, _, patch = variant.partition("/")
    if variant in SIZES and name.startswith("RN"):
        return SIZES[name], None
    if name in SIZES and name.startswith("ViT") and patch.isdecimal() and int(patch) > 0:
        return SIZES[name], int(patch)
    resnets, vits = (", ".join(size for size in SIZES if size.startswith(kind)) for kind in ("RN", "ViT"))
    raise UserError(f"model.variant={variant!r}: must be {resnets}, or one of {vits} and /PATCH")


FAMILY = Family(
    module=CLIP,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "image": merged([VisionTransformer.ROLES, ModifiedResNet.ROLES]),
            "text": TextTransformer.ROLES,
            "text_projection": LINEAR,
            "logit_scale": SCALAR,
            "logit_bias": SCALAR,
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
    from_vit=from_vit,
)
