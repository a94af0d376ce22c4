"""Every image of a split with every caption, for a model that reads both at once: scored in large blocks."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.engine import sharding, tracing
from scaling.engine.build import Built
from scaling.engine.captions import captions_of
from scaling.engine.evaluator import Pulse
from scaling.engine.matching import vision_language
from scaling.objectives.base import Extras

BLOCK = 4096  # pairs that go through the model at a time, about


def pair_scores(
    built: Built,
    weights: Mapping[str, Any],
    split: str,
    batch_size: int,
    pairs: int | None,
    pulse: Pulse,
) -> np.ndarray:
    """float32 [N, M], of image i with caption j: of the first `pairs` images of the split, None for all.

    `batch_size` images meet as many captions as make a block; every block has one shape, so that it is
    compiled once.
    """
    place = sharding.batch_sharding(built.mesh, batch_size, "batch_size")
    own = built.config.data
    tokens, images = captions_of(own, split).of(pairs)
    total, count, step = len(images), int(images[-1]) + 1, max(1, BLOCK // batch_size)
    padded = np.minimum(np.arange(-(-total // step) * step), total - 1)  # the last caption fills the block
    blocks = [
        tuple(tokens[name][rows] for name in ("text", "text_mask")) for rows in padded.reshape(-1, step)
    ]
    score, rows = _score(built), []
    for start, batch in zip(
        range(0, count, batch_size), data.eval_batches(own, split, batch_size, place), strict=False
    ):
        found = []
        for text, mask in blocks:
            pulse()
            found.append(score(weights["params"], weights["collections"], batch["image"], text, mask))
        rows.append(np.concatenate([np.asarray(each) for each in found], axis=1)[: count - start, :total])
    return np.concatenate(rows)


@lru_cache(maxsize=1)
def _score(built: Built) -> Callable[..., jax.Array]:
    """(params, collections, image [I, ...], text [T, L], mask [T, L]) -> [I, T], on every process."""
    task = vision_language("", built)

    def step(params: Any, collections: Any, image: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        images, texts = len(image), len(text)
        batch = {
            "image": jnp.repeat(image, texts, axis=0),
            "text": jnp.tile(text, (images, 1)),
            "text_mask": jnp.tile(mask, (images, 1)),
        }
        return task.score(params, Extras(collections=collections), batch).reshape(images, texts)

    return tracing.whole(built.mesh, step)
