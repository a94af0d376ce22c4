"""Contrastive learning of images and captions: the softmax loss of CLIP and the sigmoid loss of SigLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models.base import HasImageFeatures
from scaling.models.clip import Embeddings, bounded
from scaling.models.placement import constrain
from scaling.objectives.base import NO_HELPERS, Batch, Extras, Helpers, Loss, Params, summarise
from scaling.preprocessing import SYMMETRIC, Preprocessing
from scaling.randomness import derive_key

FAR = -1e9  # logit so low that it adds nothing to a sum of exponentials
FORMS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Contrastive:
    """A loss that compares every image of the global batch with every caption, of a model with `Embeddings`.

    `form` is the symmetric cross-entropy of Radford et al. 2021 (figure 3), or the sum of binary
    cross-entropies of Zhai et al. 2023 (arXiv:2303.15343, algorithm 1), for which the model needs its
    `logit_bias`.

    `chunk` is the number of rows of the [B, B] logits that exist at a time: memory then grows with B, not its
    square. `microbatch` is the number of pairs that pass through the towers at a time: their activations are
    recomputed in the backward pass, so that a batch fits whose activations would not (gradient caching: Gao
    et al. 2021, arXiv:2101.06983). Either way the gradient is that of the whole batch. Both must divide the
    batch; None is all at once.
    """

    model: nn.Module
    preprocessing: Preprocessing = SYMMETRIC
    form: Literal["softmax", "sigmoid"] = "softmax"
    chunk: int | None = None
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form={self.form!r}: must be one of {', '.join(FORMS)}")
        for key in ("chunk", "microbatch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1, or None for all at once")
        if not isinstance(self.model, HasImageFeatures):
            name = type(self.model).__name__
            raise UserError(
                f"model={name}: has no two towers; the objective contrastive is for the family clip"
            )
        if (self.form == "sigmoid") != self.model.logit_bias:  # type: ignore[attr-defined]
            required = self.form == "sigmoid"
            raise UserError(f"form={self.form!r}: needs --config.model.logit_bias={required}")

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model for images and texts of these shapes.

        Raises:
            UserError: if the batch has no texts.
        """
        if "text" not in batch:
            raise UserError("contrastive: needs images with captions; data.name must be a set that has them")
        return self.model.init(rng, *(jnp.zeros((1, *batch[k].shape[1:]), t) for k, t in INPUTS.items()))

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss, with the metrics loss, i2t_top1 and t2i_top1.

        The latter two are how often the nearest of the batch is the right one.
        """
        embeddings, collections = self._embed(params, extras, batch, rng, train)
        mask = batch.get("mask")
        real = jnp.ones(batch["text"].shape[0], bool) if mask is None else mask > 0  # [B]
        chunk = len(real) if self.chunk is None or not train else self.chunk
        values = compare(embeddings, real, self.form, chunk)
        return summarise(values, batch, collections)

    def bounded(self, params: Params) -> Params:
        """Returns the parameters after a step, in which the softmax loss bounds the scale of the logits."""
        return bounded(params) if self.form == "softmax" else params

    def embed_texts(self, params: Params, extras: Extras, text: jax.Array) -> jax.Array:
        """Computes the embeddings [N, E] of token ids [N, L], not normalised."""
        variables = {"params": params, **extras.collections}
        return jnp.asarray(self.model.apply(variables, text, method="text_features"))

    def features(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Computes the images' embeddings [B, E] float32, not normalised, for a linear probe."""
        variables = {"params": params, **extras.collections}
        image = self.preprocessing(batch["image"])
        return jnp.asarray(self.model.apply(variables, image, method="features"))

    def _embed(
        self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool
    ) -> tuple[Embeddings, Mapping[str, Any]]:
        mutable = list(extras.collections) if train else []

        def towers(image: jax.Array, text: jax.Array) -> tuple[Embeddings, Any]:
            variables = {"params": params, **extras.collections}
            rngs = {"dropout": derive_key(rng, "dropout")} if train else {}
            out: Any = self.model.apply(
                variables, self.preprocessing(image), text, train=train, rngs=rngs, mutable=mutable
            )
            return out

        if self.microbatch is None or not train:
            embeddings, updated = towers(batch["image"], batch["text"])
            return embeddings, updated if train else extras.collections
        if mutable:
            raise UserError(
                f"microbatch={self.microbatch}: BatchNorm would see part of the batch; use a model without it"
            )
        key = "objective.microbatch"
        parts = [split(batch[name], self.microbatch, key) for name in INPUTS]  # [n, m, ...]
        outputs = jax.lax.map(lambda part: jax.checkpoint(towers)(*part)[0], tuple(parts))
        image, text = joined(outputs.image), joined(outputs.text)
        scale, bias = jax.tree.map(lambda x: x[0], (outputs.scale, outputs.bias))
        return Embeddings(image, text, scale, bias), extras.collections


INPUTS = {"image": jnp.float32, "text": jnp.int32}  # columns of a batch that the towers read


def split(x: jax.Array, size: int, key: str) -> jax.Array:
    """Splits x [B, ...] into n = B / size parts [n, size, ...]: part i has the rows i, i + n, ...

    If the batch is sharded over devices, each part is sharded likewise, and no row moves.

    Raises:
        UserError: if the size does not divide the batch; it names `key`.
    """
    rows = x.shape[0]
    if rows % size:
        raise UserError(f"{key}={size}: must divide the batch of {rows}")
    parts = jnp.moveaxis(x.reshape(size, rows // size, *x.shape[1:]), 1, 0)
    return constrain(parts, None, "batch", *(None,) * (x.ndim - 1))


def joined(x: jax.Array) -> jax.Array:
    """Joins the parts [n, size, ...] of `split` to [B, ...] again."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def compare(embeddings: Embeddings, real: jax.Array, form: str, chunk: int) -> dict[str, jax.Array]:
    """Returns {"loss", "i2t_top1", "t2i_top1"}, [B] each; pairs that are not `real` [B] are no negatives.

    `chunk` images at a time are compared with all texts.
    """
    image, text, scale, _ = embeddings
    bias = 0.0 if embeddings.bias is None else embeddings.bias
    own = scale * (image * text).sum(axis=1) + bias  # [B], logits of the right pairs
    rows = jnp.arange(len(own))
    softmax = form == "softmax"

    @jax.checkpoint
    def block(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> Any:
        x, index, own_part, exists = part  # [c, E], [c] each
        logits = scale * x @ text.T + bias  # [c, B]
        other = (index[:, None] != rows[None]) & real[None] & exists[:, None]
        logits = jnp.where(other, logits, FAR)  # logits of wrong pairs only
        log_sum, best = carry  # [B] each: over the logits of a text with the images so far
        best = jnp.maximum(best, logits.max(axis=0))
        if softmax:
            log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(logits, axis=0))
            cost = jax.nn.logsumexp(logits, axis=1)  # [c]
        else:
            cost = jnp.where(other, jax.nn.softplus(logits), 0.0).sum(axis=1)
        return (log_sum, best), (cost, logits.max(axis=1) < own_part)

    start = (jnp.full(own.shape, FAR), jnp.full(own.shape, FAR))
    parts = tuple(split(each, chunk, "objective.chunk") for each in (image, rows, own, real))
    (log_sum, best), (cost, hits) = jax.lax.scan(block, start, parts)
    if softmax:
        loss = 0.5 * (jnp.logaddexp(own, joined(cost)) + jnp.logaddexp(own, log_sum)) - own
    else:
        loss = jax.nn.softplus(-own) + joined(cost)
    return {
        "loss": loss,
        "i2t_top1": joined(hits).astype(jnp.float32),
        "t2i_top1": (best < own).astype(jnp.float32),
    }
