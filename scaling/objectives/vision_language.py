"""Pre-training and retrieval on pairs of image and caption, for a model that reads both at once (ViLT)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.objectives.base import NO_HELPERS, Batch, Extras, Helpers, Loss, Params, scaled
from scaling.objectives.masking import corrupted, mean_colours, own_draw, picked, whole_words
from scaling.objectives.negatives import draw_others, shared_words
from scaling.preprocessing import SYMMETRIC, Preprocessing
from scaling.randomness import derive_key

TASKS = ("itm", "mlm", "mpp", "retrieval")  # names of the model's heads

Apply = Callable[..., dict[str, jax.Array]]  # (image, text, mask, hidden) -> the model's outputs
# The loss [B] of one task, and its metrics as values with their weights, [B, ...] each.
Part = tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]


@dataclass(frozen=True)
class VisionLanguage:
    """The weighted sum of the tasks whose weight is not 0; each takes a pass of its own through the model.

    `itm` (Kim et al. 2021, section 3.2): does the caption belong to the image? Every second pair of the batch
    has another caption of the global batch. `mlm` (sections 3.2 and 3.3): which tokens are hidden in a
    caption? Whole words are. `mpp` (section 4.5): which mean colour, in 256 levels per channel, do hidden
    patches have? `retrieval` (section 4.4): which of the right and `captions` wrong captions is an image's
    own?

    `share` of the words or patches is hidden, at least one. Wrong captions are drawn at random; `hardness` h
    prefers those that share words with the right one, by exp(h * cosine of the bags of words). `mask_token`
    is the id of [MASK]; None is the data's.

    In evaluation the caption itself decides what is hidden, words are always hidden by [MASK], and wrong
    captions come from the batch's columns "wrong_text" and "wrong_mask" [B, K, L], so that no example's
    result depends on another.
    """

    model: nn.Module
    preprocessing: Preprocessing = SYMMETRIC
    itm: float = 1.0
    mlm: float = 1.0
    mpp: float = 0.0
    retrieval: float = 0.0
    share: float = 0.15
    captions: int = 15
    hardness: float = 0.0
    mask_token: int | None = None

    def __post_init__(self) -> None:
        heads = getattr(self.model, "tasks", None)
        if heads is None:
            name = type(self.model).__name__
            raise UserError(f"model={name}: reads no pairs; the objective vision_language is for vilt")
        for key in (*TASKS, "hardness"):
            if getattr(self, key) < 0.0:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 0")
        if not self._weights:
            raise UserError(f"{TASKS[0]}=0.0: one of {', '.join(TASKS)} must have a weight")
        for task, weight in self._weights.items():
            if task not in heads:
                raise UserError(f"{task}={weight}: model.tasks={heads} must have {task}")
        if not 0.0 < self.share < 1.0:
            raise UserError(f"share={self.share}: must be between 0 and 1")
        if self.captions < 1:
            raise UserError(f"captions={self.captions}: must be at least 1")
        if self.mask_token is not None and self.mask_token < 0:
            raise UserError(f"mask_token={self.mask_token}: must be at least 0, the id of a token, or None")
        if self.mlm and self.mask_token is None:
            raise UserError(f"mlm={self.mlm}: the tokenizer has no [MASK]; use data.text.name='wordpiece'")

    @property
    def _weights(self) -> dict[str, float]:
        """The weights of the tasks that are learned."""
        weights = zip(TASKS, (self.itm, self.mlm, self.mpp, self.retrieval), strict=True)
        return {task: weight for task, weight in weights if weight > 0.0}

    @property
    def wrong(self) -> int:
        """The number of wrong captions per image that evaluation needs."""
        return self.captions if self.retrieval else int(self.itm > 0.0)

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model for images and texts of these shapes.

        Raises:
            UserError: if the batch has no texts.
        """
        if "text" not in batch:
            raise UserError(
                "vision_language: needs images with captions; data.name must be a set that has them"
            )
        image, text = (jnp.zeros((1, *batch[name].shape[1:])) for name in ("image", "text"))
        return self.model.init(rng, image, text.astype(jnp.int32), text == 0.0)

    def forward(self, params: Params, extras: Extras, batch: Batch) -> dict[str, jax.Array]:
        """Applies the model with all its heads once to the pairs; this is the pass whose cost is counted."""
        return self._bind_model(params, extras, {})(batch["image"], batch["text"], batch["text_mask"])

    def score(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Scores how well each image and its text match, [B]: by the retrieval head, else itm's log odds."""
        out = self.forward(params, extras, batch)
        return out["retrieval"][:, 0] if "retrieval" in out else out["itm"][:, 1] - out["itm"][:, 0]

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss with the metrics loss, each task's own loss, and the tasks' accuracies.

        These are itm_accuracy, mlm_accuracy (of tokens) and retrieval_top1. Each task's loss is a mean over
        examples; an example's loss is a mean over its hidden tokens or patches.

        Raises:
            UserError: if evaluation has no wrong captions.
        """
        mask = batch.get("mask")
        real = jnp.ones(batch["text"].shape[0], bool) if mask is None else mask > 0  # [B]
        if not train and self.wrong and "wrong_text" not in batch:
            raise UserError("vision_language: evaluation needs wrong captions, which name='matching' reads")
        real_weight = real.astype(jnp.float32)
        total = jnp.zeros(real_weight.shape)
        weighted: dict[str, tuple[jax.Array, jax.Array]] = {}
        parts = dict(zip(TASKS, (self._itm, self._mlm, self._mpp, self._retrieval), strict=True))
        for task, weight in self._weights.items():
            rngs = {"dropout": derive_key(rng, f"{task} dropout")} if train else {}
            cost, metrics = parts[task](
                self._bind_model(params, extras, rngs), batch, derive_key(rng, task), real, train
            )
            total = total + weight * cost
            weighted |= {task: (cost, real_weight), **metrics}
        weighted = {"loss": (total, real_weight), **weighted}
        # A product with the weights would not do: a row that is not real may hold anything, NaN too.
        sums = {k: jnp.where(w > 0.0, x, 0.0).sum() for k, (x, w) in weighted.items()}
        counts = {k: w.sum() for k, (_, w) in weighted.items()}
        value = sums["loss"] / jnp.maximum(counts["loss"], 1.0)
        return Loss(value, sums, counts, extras.collections)

    def hidden_words(self, batch: Batch) -> jax.Array:
        """Returns which tokens evaluation hides, bool [B, L]."""
        draw = own_draw(batch["text"], "words", batch["text"].shape[1])
        return whole_words(draw, batch["text_word"], self.share)

    def _bind_model(self, params: Params, extras: Extras, rngs: Mapping[str, jax.Array]) -> Apply:
        def apply(
            image: jax.Array, text: jax.Array, mask: jax.Array, hidden: jax.Array | None = None
        ) -> dict[str, jax.Array]:
            variables = {"params": params, **extras.collections}
            out: Any = self.model.apply(
                variables, self.preprocessing(image), text, mask, hidden, train=bool(rngs), rngs=dict(rngs)
            )
            return out

        return apply

    def _others(self, batch: Batch, rng: jax.Array, real: jax.Array, count: int) -> Any:
        """Draws wrong captions of the batch: texts [B, count, L], their masks, and which exist [B, count]."""
        likeness = None
        if self.hardness:
            vocabulary: int = self.model.vocabulary  # type: ignore[attr-defined]
            likeness = self.hardness * shared_words(batch["text"], batch["text_word"], vocabulary)
        index, exists = draw_others(rng, batch["text"], real, count, likeness)
        return batch["text"][index], batch["text_mask"][index], exists

    def _itm(self, apply: Apply, batch: Batch, rng: jax.Array, real: jax.Array, train: bool) -> Part:
        image, text, mask = batch["image"], batch["text"], batch["text_mask"]
        if train:
            others, masks, exists = self._others(batch, rng, real, 1)
            swapped = exists[:, 0] & (jnp.arange(len(text)) % 2 == 1)  # rows are in random order already
            text = jnp.where(swapped[:, None], others[:, 0], text)
            mask = jnp.where(swapped[:, None], masks[:, 0], mask)
            cost, hit = _match_loss(apply(image, text, mask)["itm"], ~swapped)
        else:
            right = _match_loss(apply(image, text, mask)["itm"], jnp.ones(real.shape, bool))
            wrong = _match_loss(
                apply(image, batch["wrong_text"][:, 0], batch["wrong_mask"][:, 0])["itm"],
                jnp.zeros(real.shape, bool),
            )
            cost, hit = ((a + b) / 2.0 for a, b in zip(right, wrong, strict=True))
        return cost, {"itm_accuracy": (hit, real.astype(jnp.float32))}

    def _mlm(self, apply: Apply, batch: Batch, rng: jax.Array, real: jax.Array, train: bool) -> Part:
        text, vocabulary = batch["text"], self.model.vocabulary  # type: ignore[attr-defined]
        assert self.mask_token is not None  # ensured by __post_init__
        if train:
            draw = jax.random.uniform(derive_key(rng, "words"), text.shape)
            hide = whole_words(draw, batch["text_word"], self.share)  # [B, L]
            inputs = corrupted(derive_key(rng, "tokens"), text, hide, self.mask_token, vocabulary)
        else:
            hide = self.hidden_words(batch)
            inputs = jnp.where(hide, jnp.asarray(self.mask_token, text.dtype), text)
        logits = apply(batch["image"], inputs, batch["text_mask"])["mlm"]  # [B, L, V]
        cost, hit = _cross_entropy(logits, text)  # [B, L] each
        weight = (hide & real[:, None]).astype(jnp.float32)
        return _mean(cost, hide), {"mlm_accuracy": (hit, weight)}

    def _mpp(self, apply: Apply, batch: Batch, rng: jax.Array, real: jax.Array, train: bool) -> Part:
        colours = mean_colours(scaled(batch["image"]), self.model.patch)  # type: ignore[attr-defined]
        shape = colours.shape[:2]  # [B, M]
        draw = jax.random.uniform(rng, shape) if train else own_draw(batch["text"], "patches", shape[1])
        hide = picked(draw, jnp.full(shape[:1], shape[1]), self.share)
        logits = apply(batch["image"], batch["text"], batch["text_mask"], hide)["mpp"]  # [B, M, C, 256]
        cost, _ = _cross_entropy(logits, colours)  # [B, M, C]
        return _mean(cost.mean(axis=-1), hide), {}

    def _retrieval(self, apply: Apply, batch: Batch, rng: jax.Array, real: jax.Array, train: bool) -> Part:
        text, mask = batch["text"], batch["text_mask"]
        others, masks, exists = batch.get("wrong_text"), batch.get("wrong_mask"), None
        if train:
            count = min(self.captions, len(text) - 1)
            others, masks, exists = self._others(batch, rng, real, count)
        assert others is not None and masks is not None  # ensured by `loss`
        texts = jnp.concatenate([text[:, None], others], axis=1)  # [B, 1 + K, L]
        masks = jnp.concatenate([mask[:, None], masks], axis=1)
        images = jnp.repeat(batch["image"], texts.shape[1], axis=0)
        flat = (each.reshape(-1, each.shape[-1]) for each in (texts, masks))
        logits = apply(images, *flat)["retrieval"].reshape(texts.shape[:2])  # [B, 1 + K]
        if exists is not None:
            exists = jnp.pad(exists, ((0, 0), (1, 0)), constant_values=True)  # the right caption does
            logits = jnp.where(exists, logits, -jnp.inf)
        cost = -jax.nn.log_softmax(logits)[:, 0]
        hit = (logits[:, 1:] < logits[:, :1]).all(axis=1)
        return cost, {"retrieval_top1": (hit.astype(jnp.float32), real.astype(jnp.float32))}


def _cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of `logits` [..., K], and 1 where the label is the largest; float32 [...]."""
    cost = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)[..., 0]
    return cost, topk_hits(logits, label, 1)


def _match_loss(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _cross_entropy(logits, label.astype(jnp.int32))


def _mean(cost: jax.Array, hide: jax.Array) -> jax.Array:
    """Returns each row's mean over what is hidden, 0 if nothing is: [B, N], bool [B, N] -> [B]."""
    weight = hide.astype(jnp.float32)
    return jnp.where(hide, cost, 0.0).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
