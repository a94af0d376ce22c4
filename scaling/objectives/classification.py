"""Softmax cross-entropy, with label smoothing, mixup and CutMix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.objectives.base import NO_HELPERS, Batch, Extras, Helpers, Loss, Params, summarise
from scaling.preprocessing import SYMMETRIC, Preprocessing
from scaling.randomness import derive_key

HEADS = ("vqa", "nlvr2")  # classifying heads of a model that reads texts too


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a model `(x [B, H, W, C], train) -> logits [B, num_classes]`.

    `label_smoothing` s gives the target (1 - s) onehot + s / num_classes (Szegedy et al. 2016,
    arXiv:1512.00567, sec. 7); `mixup` and `cutmix` are the alphas of Zhang et al. 2018 (arXiv:1710.09412) and
    Yun et al. 2019 (arXiv:1905.04899), 0 for none. With both, each batch has one of them, with even odds, as
    in DeiT's recipe. All three apply in training only, so that evaluated losses are comparable between runs
    that differ in them.

    For a model that reads a text with each image (ViLT), with the task vqa or nlvr2, the logits are those of
    an answer, or of the text being true of two images [B, 2, H, W, C]; its texts are batch["text"] [B, L].
    """

    model: nn.Module
    preprocessing: Preprocessing = SYMMETRIC
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing={self.label_smoothing}: must be in [0, 1)")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0.0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 (none) or a positive alpha")
        tasks = getattr(self.model, "tasks", None)
        if tasks is not None and (self._head is None or self.mixup + self.cutmix > 0.0):
            reason = "model.tasks must have vqa or nlvr2" if self._head is None else "texts cannot be mixed"
            raise UserError(f"mixup={self.mixup}, cutmix={self.cutmix}, tasks={tasks}: {reason}")

    @property
    def _head(self) -> str | None:
        """The head of a model that reads texts whose logits are trained; None for a model of images only."""
        return next((head for head in HEADS if head in getattr(self.model, "tasks", ())), None)

    def _texts(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Returns the model's inputs after the images: none, or texts [B, L] and their masks."""
        if self._head is None:
            return ()
        if "text" not in batch:
            raise UserError(f"classification: the task {self._head} needs texts; choose data that have them")
        return batch["text"], batch["text_mask"]

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model; of the batch only shapes are read."""
        texts = (jnp.zeros((1, *each.shape[1:]), each.dtype) for each in self._texts(batch))
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])), *texts, train=False)

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss with the metrics loss, top1 and top5, against the unmixed labels.

        In training, its collections are updated.
        """
        x = self.preprocessing(batch["image"])  # [B, H, W, C]
        labels = batch["label"]  # [B]
        mixed = train and (self.mixup > 0.0 or self.cutmix > 0.0)
        if mixed:
            pixel_share, label_share = self._mixing(rng, x.shape)
            # The batch is already shuffled, so that a neighbour is as good a partner as a random one.
            x = pixel_share * x + (1.0 - pixel_share) * jnp.roll(x, 1, axis=0)
        logits, collections = self._logits(params, extras, x, self._texts(batch), rng, train)  # [B, K]
        targets = jax.nn.one_hot(labels, logits.shape[-1])  # [B, K]
        if mixed:
            targets = label_share * targets + (1.0 - label_share) * jnp.roll(targets, 1, axis=0)
        if train:
            targets = (1.0 - self.label_smoothing) * targets + self.label_smoothing / logits.shape[-1]
        values = {
            "loss": -(targets * jax.nn.log_softmax(logits)).sum(axis=-1),  # [B]
            "top1": topk_hits(logits, labels, 1),
            "top5": topk_hits(logits, labels, 5),
        }
        return summarise(values, batch, collections)

    def _mixing(self, rng: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Draws the share that each image keeps of its pixels, [] or [1, H, W, 1], and of its label, []."""
        pixel_share = label_share = jnp.ones(())
        if self.mixup > 0.0:
            pixel_share = label_share = jax.random.beta(derive_key(rng, "mixup"), self.mixup, self.mixup)
        if self.cutmix > 0.0:
            outside, outside_share = _outside_a_box(derive_key(rng, "cutmix"), self.cutmix, shape)
            use_cutmix = jnp.bool_(True)
            if self.mixup > 0.0:
                use_cutmix = jax.random.bernoulli(derive_key(rng, "mixup or cutmix"))
            pixel_share = jnp.where(use_cutmix, outside, pixel_share)
            label_share = jnp.where(use_cutmix, outside_share, label_share)
        return pixel_share, label_share

    def logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Computes the model's logits [B, K] float32 of batch["image"], as in evaluation."""
        x, texts = self.preprocessing(batch["image"]), self._texts(batch)
        return self._logits(params, extras, x, texts, jax.random.key(0), train=False)[0]

    def features(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Computes the model's pooled features [B, D] float32 of batch["image"], for a Fréchet distance."""
        variables = {"params": params, **extras.collections}
        out = self.model.apply(variables, self.preprocessing(batch["image"]), method="features")
        return jnp.asarray(out).astype(jnp.float32)

    def _logits(
        self,
        params: Params,
        extras: Extras,
        x: jax.Array,
        texts: tuple[jax.Array, ...],
        rng: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        mutable = list(extras.collections) if train else []
        out, updated = self.model.apply(
            {"params": params, **extras.collections},
            x,
            *texts,
            train=train,
            rngs={"dropout": derive_key(rng, "dropout")} if train else {},
            mutable=mutable,
        )
        logits: Any = out if self._head is None else out[self._head]  # type: ignore[call-overload]
        return jnp.asarray(logits).astype(jnp.float32), updated if train else extras.collections


def _outside_a_box(rng: jax.Array, alpha: float, shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Draws CutMix's M (equations 1 and 2) for images [..., H, W, C]: [1, H, W, 1], 0 in a box and 1 outside.

    The box has the image's proportions, an area of 1 - Beta(alpha, alpha) and a centre anywhere, and is
    clipped at the border. Also returns the mean of M, the share of the label that is kept.
    """
    draw, *centres = jax.random.split(rng, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(draw, alpha, alpha))  # [], share of H and of W
    inside = []
    for length, key in zip(shape[-3:-1], centres, strict=True):
        centre = jax.random.randint(key, (), 0, length)
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        position = jnp.arange(length)
        inside.append((position >= centre - half) & (position < centre + half))  # [H] and [W]
    outside = 1.0 - (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)  # [H, W]
    # Every frame of a video [B, T, H, W, C] has the same box.
    return outside.reshape((1,) * (len(shape) - 3) + (*outside.shape, 1)), outside.mean()
