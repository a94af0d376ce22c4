"""ViLT (Kim et al. 2021, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision").

x is an image [B, H, W, C] and text its word pieces [B, N], [CLS] first; D is the width, M the number of
patches. One transformer reads words and patches alike.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.attention import bias_of
from scaling.models.base import Family
from scaling.models.layers import (
    ACTIVATION_FUNCTIONS,
    Dense,
    Embed,
    EncoderBlock,
    Remat,
    drop_rates,
    layer_norm,
    patch_grid,
    patchify,
    position_grid,
    prepended,
    said_resized,
    stack,
)
from scaling.models.placement import constrain
from scaling.models.roles import EMBED, EMBEDDING, LINEAR, NORM, POSITIONS, TOKEN, VECTOR, Blocks, Part
from scaling.models.variants import side_lengths

Task = Literal["itm", "mlm", "mpp", "vqa", "retrieval", "nlvr2"]


@dataclasses.dataclass(frozen=True)
class ViLTSize(variants.TransformerSize):
    """A row of the size table, with the text that the size is meant for."""

    num_classes: int = 3129  # answers of VQAv2
    vocabulary: int = 30522  # BERT's uncased word pieces
    length: int = 40

    def fields(self, patch: int) -> dict[str, int]:
        text = {"vocabulary": self.vocabulary, "length": self.length}
        return {**super().fields(patch), **text, "resolution": self.shape[0]}


def small(depth: int, width: int) -> ViLTSize:
    """Returns a row of the ladder, with heads of width 8, as in the ViT's ladder."""
    return ViLTSize(depth, width, width // 8, shape=(32, 32, 3), vocabulary=2048, length=16)


SIZES = {  # B: section 4.2 of the paper; the others are for drawings with short captions on a laptop
    "B": ViLTSize(depth=12, width=768, heads=12, shape=(384, 384, 3)),
    "A": small(depth=2, width=16),
    "F": small(depth=2, width=32),
    "P": small(depth=4, width=32),
    "T": small(depth=4, width=128),
}
VARIANTS: tuple[variants.Variant, ...] = (
    ("B/32", {}),
    *((f"{size}/{patch}", {}) for size in "AFP" for patch in (16, 8, 4)),
    ("T/4", {}),
)

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


def resize_positions(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], extra: int = 0
) -> jax.Array:
    """Interpolates a learned table [extra + h * w, D] for an `old` (h, w) grid linearly for a `new` one.

    The corners of both grids coincide, as in the authors' code and unlike the ViT's resizing. The first
    `extra` rows, of class tokens, are unchanged.
    """
    if old == new:
        return table
    matrices = []
    for before, after in zip(old, new, strict=True):
        coordinates = np.linspace(0, before - 1, after)[:, None]  # of new positions among the old
        matrices.append(np.maximum(0, 1 - np.abs(coordinates - np.arange(before))).astype(np.float32))
    width = table.shape[-1]
    resized = jnp.einsum("ih,jw,hwd->ijd", *matrices, table[extra:].reshape(*old, width))
    return jnp.concatenate([table[:extra], resized.reshape(-1, width)])


class TextEmbedding(nn.Module):
    """BERT's embedding: words [B, N, D] with their positions, through LayerNorm (equation 1).

    A text is one segment, the first of the two in BERT's table.

    Raises:
        UserError: if N is greater than `length`.
    """

    length: int
    epsilon: float

    ROLES = Part({"positions": POSITIONS, "segment_embedding": EMBEDDING, "norm": NORM})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, width = x.shape[1:]
        if count > self.length:
            raise UserError(f"length={self.length}: must be at least the text's, which is {count}")
        positions = self.param("positions", normal, (self.length, width))
        segments = self.param("segment_embedding", normal, (2, width))
        x = x + (positions[:count] + segments[:1]).astype(x.dtype)[None]  # [B, N, D]
        return layer_norm(x, "norm", epsilon=self.epsilon)


class ImageEmbedding(nn.Module):
    """A class token and the patches of x [B, H, W, C], with their positions: [B, 1 + M, D] (equation 2).

    Patches are all of the image's, in reading order. With `mask_token`, those that `hidden` [B, M] marks are
    replaced by a learned vector before their positions are added.
    """

    patch: int
    width: int
    resolution: int | tuple[int, int]
    mask_token: bool = False
    dtype: Any = jnp.float32

    ROLES = Part({"patch": LINEAR, "mask_token": TOKEN, "token": TOKEN, "positions": POSITIONS})

    @nn.compact
    def __call__(self, x: jax.Array, hidden: jax.Array | None = None) -> jax.Array:
        grid, old = patch_grid(x.shape, self.patch), position_grid(self.resolution, self.patch)
        x = Dense(self.width, dtype=self.dtype, name="patch")(patchify(x, self.patch))  # [B, M, D]
        if self.mask_token:
            token = self.param("mask_token", zeros, (1, self.width)).astype(self.dtype)
            x = x if hidden is None else jnp.where(hidden[:, :, None], token[None], x)
        x = prepended(self.param("token", zeros, (1, self.width)), x)  # [B, 1 + M, D]
        table = self.param("positions", normal, (1 + math.prod(old), self.width))
        positions = resize_positions(table, old, grid, extra=1)  # [1 + M, D]
        return x + positions.astype(self.dtype)[None]


def transform(x: jax.Array, epsilon: float) -> jax.Array:
    """Applies the first layers of BERT's heads for single tokens: [B, N, D] -> [B, N, D]."""
    x = Dense(x.shape[-1], kernel_init=normal, name="dense")(x)
    return layer_norm(ACTIVATION_FUNCTIONS["gelu"](x), "norm", epsilon=epsilon)


class MaskedWords(nn.Module):
    """x [B, N, D] -> logits of the words [B, N, V], from the table [V, D] that embeds them."""

    epsilon: float

    ROLES = Part({"dense": LINEAR, "norm": NORM, "bias": VECTOR})

    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        bias = self.param("bias", zeros, (table.shape[0],))
        logits = jnp.einsum("bnd,vd->bnv", transform(x, self.epsilon), table)  # [B, N, V]
        return logits + bias[None, None]


class MaskedPatches(nn.Module):
    """x [B, M, D] -> logits of a patch's mean colour, of 256 levels per channel: [B, M, C, 256]."""

    channels: int
    epsilon: float

    ROLES = Part({"dense": LINEAR, "norm": NORM, "decoder": LINEAR})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        decoder = Dense(self.channels * 256, kernel_init=normal, name="decoder")
        return decoder(transform(x, self.epsilon)).reshape(*x.shape[:2], self.channels, 256)


class Classifier(nn.Module):
    """Head of two layers (section 4.3), x [B, ...] -> logits [B, num_classes]."""

    hidden: int
    num_classes: int

    ROLES = Part({"up": LINEAR, "norm": NORM, "head": LINEAR})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense(self.hidden, kernel_init=normal, name="up")(x)  # [B, hidden]
        x = layer_norm(x, "norm", epsilon=1e-5)  # PyTorch's epsilon, not the trunk's
        x = ACTIVATION_FUNCTIONS["gelu"](x)
        return Dense(self.num_classes, kernel_init=normal, name="head")(x)  # [B, num_classes]


class ViLT(nn.Module):
    """x [B, H, W, C], text [B, N] int32, mask [B, N] bool -> a dict of float32 arrays.

    `mask` is true where there is a word. Other positions of the text are not attended to, so that their ids
    change only the outputs at those positions. The features are "pooled" [B, D], "text" [B, N, D] and "image"
    [B, 1 + M, D], the class token first. Each of `tasks` adds an output:
      "itm" [B, 2]: image-text matching, logits of no and yes;
      "mlm" [B, N, vocabulary]: masked words, whose output layer is the table that embeds them;
      "mpp" [B, M, C, 256]: the mean colour of patches, of which `hidden` [B, M] bool marks the masked;
      "vqa" [B, num_classes]: visual question answering;
      "retrieval" [B, 1]: how well image and text fit;
      "nlvr2" [B, 2]: whether the text is true of two images, x [B, 2, H, W, C]. Features are then those of
      2B pairs of text and image. It cannot be combined with another task.

    `resolution` is the side, or (H, W), that the positions of patches are made for; for inputs of another
    size their table is resized. The trunk is initialised as ViT's; tables of text and types, pooler and heads
    are initialised N(0, 0.02). The published weights have `epsilon` 1e-12 in transformers' form.

    Raises:
        UserError: if `patch` does not divide H and W, `heads` does not divide the width, the text is longer
            than `length`, or x or `hidden` does not fit `tasks`.
    """

    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    vocabulary: int = 30522
    length: int = 40
    num_classes: int = 3129
    tasks: tuple[Task, ...] = ()
    resolution: int | tuple[int, int] = 384
    epsilon: float = 1e-12  # epsilon of LayerNorm
    drop_path: float = 0.0  # the last block's rate of stochastic depth; it rises linearly with depth
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of patches of an image [..., H, W, C], without words and the class token."""
        return math.prod(patch_grid(shape, self.patch))

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        hidden: jax.Array | None = None,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        """Applies the model; `train` turns on stochastic depth, which draws from the "dropout" stream."""
        self._check(x, hidden)
        dtype, channels, images = jnp.dtype(self.dtype), x.shape[-1], 1
        if "nlvr2" in self.tasks:  # each text goes with the first image and with the second; B becomes 2B
            images, x = 2, x.reshape(-1, *x.shape[2:])
            text, mask = (jnp.repeat(each, 2, axis=0) for each in (text, mask))

        word = Embed(self.vocabulary, self.width, embedding_init=normal, dtype=dtype, name="word")
        t = TextEmbedding(self.length, self.epsilon, name="text")(word(text))  # [B, N, D]
        v = ImageEmbedding(self.patch, self.width, self.resolution, "mpp" in self.tasks, dtype, name="image")(
            x, hidden
        )  # [B, 1 + M, D]
        types = self.param("modality_embedding", normal, (1 + images, self.width)).astype(dtype)
        image_type = 1 + jnp.arange(x.shape[0]) % images  # [B]
        x = jnp.concatenate([t + types[None, :1], v + types[image_type][:, None]], axis=1)  # equation 3
        x = constrain(x, "batch", "token", "embed")  # [B, N + 1 + M, D]

        attended = jnp.pad(mask, ((0, 0), (0, v.shape[1])), constant_values=True)  # [B, N + 1 + M]
        block = EncoderBlock(
            self.heads, self.mlp_ratio, "gelu", epsilon=self.epsilon, dtype=dtype, name="blocks"
        )
        drop = drop_rates(self.drop_path, self.depth, train)
        repeat: dict[str, Any] = dict(drop=drop, remat=self.remat, unroll=self.unroll)
        x = stack(block, self.depth, x, bias_of(attended)[:, None, None], **repeat)  # [B, N + 1 + M, D]
        x = layer_norm(x.astype(jnp.float32), "norm", epsilon=self.epsilon)
        pooled = jnp.tanh(Dense(self.width, kernel_init=normal, name="pooler")(x[:, 0]))  # [B, D], equation 6

        out = {"pooled": pooled, "text": x[:, : text.shape[1]], "image": x[:, text.shape[1] :]}
        if "itm" in self.tasks:
            out["itm"] = Dense(2, kernel_init=normal, name="itm")(pooled)
        if "mlm" in self.tasks:
            out["mlm"] = MaskedWords(self.epsilon, name="mlm")(out["text"], word.embedding)
        if "mpp" in self.tasks:
            out["mpp"] = MaskedPatches(channels, self.epsilon, name="mpp")(out["image"][:, 1:])
        if "vqa" in self.tasks:
            out["vqa"] = Classifier(2 * self.width, self.num_classes, name="vqa")(pooled)
        if "retrieval" in self.tasks:
            out["retrieval"] = Dense(1, kernel_init=normal, name="retrieval")(pooled)
        if "nlvr2" in self.tasks:
            pairs = pooled.reshape(-1, 2 * self.width)  # [B / 2, 2D]
            out["nlvr2"] = Classifier(2 * self.width, 2, name="nlvr2")(pairs)
        return out

    def _check(self, x: jax.Array, hidden: jax.Array | None) -> None:
        """Checks that x and hidden fit the tasks."""
        pair, tasks = "nlvr2" in self.tasks, ",".join(self.tasks) or "()"
        if pair and len(self.tasks) > 1:
            raise UserError(f"tasks={tasks}: nlvr2 reads two images; leave the other tasks out")
        if x.ndim != 4 + pair or (pair and x.shape[1] != 2):
            wanted = "[B, 2, H, W, C]" if pair else "[B, H, W, C]"
            raise UserError(f"tasks={tasks}: images must be {wanted}, and are {list(x.shape)}")
        if hidden is not None and "mpp" not in self.tasks:
            raise UserError(f"tasks={tasks}: must have mpp where patches are hidden")


def make(variant: str, **options: Any) -> ViLT:
    """Returns the ViLT that `variant` names, e.g. "B/32"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch = variants.parse(variant, SIZES)
    return variants.build(ViLT, size.fields(patch), options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example: x [1, H, W, C], for nlvr2 [1, 2, H, W, C], text and mask [1, N].

    The option `resolution` changes H and W, the option `length` N.
    """
    model, (size, _) = make(variant, **options), variants.parse(variant, SIZES)
    images = (2,) if "nlvr2" in model.tasks else ()
    x = (1, *images, *side_lengths(model.resolution), size.shape[2])
    return {
        "x": jax.ShapeDtypeStruct(x, jnp.float32),
        "text": jax.ShapeDtypeStruct((1, model.length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, model.length), jnp.bool_),
    }


def resized(variables: Mapping[str, Any], old: ViLT, new: ViLT) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables of `old` for `new`, which differs in resolution alone, and what was resized."""
    before, after = (position_grid(m.resolution, m.patch) for m in (old, new))
    params = dict(variables["params"])
    table = jnp.asarray(params["image"]["positions"])
    params["image"] = {**params["image"], "positions": resize_positions(table, before, after, extra=1)}
    return {**variables, "params": params}, [said_resized("image/positions", before, after)]


def fit_heads(params: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters `source` of another ViLT with the heads of `params`, as the authors fine-tune.

    Retrieval becomes the logit of a match, the type of a second image that of the first. Other heads that
    `source` lacks are those of `params`, and heads that `params` lack are left out.
    """
    fitted = {name: source.get(name, initial) for name, initial in params.items()}
    if "retrieval" in params and "retrieval" not in source and "itm" in source:
        fitted["retrieval"] = {"kernel": source["itm"]["kernel"][:, 1:], "bias": source["itm"]["bias"][1:]}
    types = source.get("modality_embedding")
    if types is not None and len(types) == 2 and len(params["modality_embedding"]) == 3:
        fitted["modality_embedding"] = jnp.concatenate([types, types[1:]])
    return fitted


FAMILY = Family(
    module=ViLT,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "word": EMBED,
            "text": TextEmbedding.ROLES,
            "image": ImageEmbedding.ROLES,
            "modality_embedding": EMBEDDING,
            "blocks": EncoderBlock.ROLES.at(Blocks()),
            "norm": NORM.at("after"),
            "pooler": LINEAR,
            "itm": LINEAR,
            "mlm": MaskedWords.ROLES,
            "mpp": MaskedPatches.ROLES,
            "vqa": Classifier.ROLES,
            "retrieval": LINEAR,
            "nlvr2": Classifier.ROLES,
        }
    ),
    make=make,
    inputs=inputs,
    resized=resized,
    fit_heads=fit_heads,
)
