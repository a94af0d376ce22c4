"""Softmax cross-entropy, with label smoothing and mixup."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.objectives.base import Batch, Extras, Loss, Params, scaled, stream, summarise


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a model `(x [B, H, W, C], train) -> logits [B, num_classes]`.

    `label_smoothing` s gives the target (1 - s) onehot + s / num_classes (Szegedy et al. 2016,
    arXiv:1512.00567, sec. 7); `mixup` is the alpha of Zhang et al. 2018 (arXiv:1710.09412), 0 for none. Both
    act in training only, so that evaluated losses compare between runs that differ in them.
    """

    model: nn.Module
    label_smoothing: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing={self.label_smoothing}: must be in [0, 1)")
        if self.mixup < 0.0:
            raise UserError(f"mixup={self.mixup}: must be 0 (none) or a positive alpha")

    def init(self, rng: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Variables of the model; only the shape of batch["image"] [B, H, W, C] is read."""
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])), train=False)

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Metrics: loss, top1, top5 (against the unmixed label). Collections come back updated when train."""
        x = scaled(batch["image"])  # [B, H, W, C]
        labels = batch["label"]  # [B]
        if train and self.mixup > 0.0:
            share = jax.random.beta(stream(rng, "mixup"), self.mixup, self.mixup)  # []
            # The batch is already shuffled, so that a neighbour is as good a partner as a random one.
            x = share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)
        logits, collections = self._logits(params, extras, x, rng, train)  # [B, K]
        targets = jax.nn.one_hot(labels, logits.shape[-1])  # [B, K]
        if train and self.mixup > 0.0:
            targets = share * targets + (1.0 - share) * jnp.roll(targets, 1, axis=0)
        if train:
            targets = (1.0 - self.label_smoothing) * targets + self.label_smoothing / logits.shape[-1]
        values = {
            "loss": -(targets * jax.nn.log_softmax(logits)).sum(axis=-1),  # [B]
            "top1": topk_hits(logits, labels, 1),
            "top5": topk_hits(logits, labels, 5),
        }
        return summarise(values, batch, collections)

    def features(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """The model's pooled features [B, D] float32 of batch["image"], for a Fréchet distance."""
        variables = {"params": params, **extras.collections}
        out = self.model.apply(variables, scaled(batch["image"]), method="features")
        return jnp.asarray(out).astype(jnp.float32)

    def _logits(
        self, params: Params, extras: Extras, x: jax.Array, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        mutable = list(extras.collections) if train else []
        logits, updated = self.model.apply(
            {"params": params, **extras.collections},
            x,
            train=train,
            rngs={"dropout": stream(rng, "dropout")} if train else {},
            mutable=mutable,
        )
        return jnp.asarray(logits).astype(jnp.float32), updated if train else extras.collections
