"""Scores of every image of a split with every caption, in blocks, by a model that reads both at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.evaluators.base import Context, Weights
from scaling.evaluators.captions import captions_of
from scaling.evaluators.matching import vision_language
from scaling.objectives.base import Extras
from scaling.parallel import sharding, tracing
from scaling.run.build import Run, shared_by_runs

PAIRS_PER_CALL = 4096  # approximate number of pairs per pass of the model


def make_pair_scores(
    context: Context, split: str, batch_size: int, pairs: int | None
) -> Callable[[Weights], np.ndarray]:
    """Returns a function weights -> scores float32 [N, M] of image i with caption j.

    They are of the first `pairs` images, or all if None.

    A block is `batch_size` images with as many captions as make about PAIRS_PER_CALL pairs; every block has
    the same shape, so that it is compiled once.
    """
    run = context.run
    batch_sharding = sharding.batch_sharding(run.mesh, batch_size, "batch_size")
    own = run.config.data
    tokens, images = captions_of(own, split).of(pairs)
    total, count, step = len(images), int(images[-1]) + 1, max(1, PAIRS_PER_CALL // batch_size)
    padded = np.minimum(np.arange(-(-total // step) * step), total - 1)  # the last caption fills the block
    text_blocks = [
        tuple(tokens[name][rows] for name in ("text", "text_mask")) for rows in padded.reshape(-1, step)
    ]
    score = _make_score(run)

    def scores(weights: Weights) -> np.ndarray:
        rows = []
        batches = data.eval_batches(own, split, batch_size, batch_sharding)
        for start, batch in zip(range(0, count, batch_size), batches, strict=False):
            blocks = []
            for text, mask in text_blocks:
                context.check_interrupt()
                blocks.append(score(weights["params"], weights["collections"], batch["image"], text, mask))
            row = np.concatenate([np.asarray(block) for block in blocks], axis=1)
            rows.append(row[: count - start, :total])
        return np.concatenate(rows)

    return scores


@shared_by_runs
def _make_score(run: Run) -> Callable[..., jax.Array]:
    """Returns a function (params, collections, image [I, ...], text [T, L], mask [T, L]) -> scores [I, T].

    The scores are the same on every process.
    """
    objective = vision_language("", run)

    def step(params: Any, collections: Any, image: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        images, texts = len(image), len(text)
        batch = {
            "image": jnp.repeat(image, texts, axis=0),
            "text": jnp.tile(text, (images, 1)),
            "text_mask": jnp.tile(mask, (images, 1)),
        }
        return objective.score(params, Extras(collections=collections), batch).reshape(images, texts)

    return tracing.jit_replicated(run.mesh, step)
