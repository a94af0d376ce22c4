"""Whether the right one of many is found, and how well pairs fit."""

import jax
import jax.numpy as jnp
import numpy as np

RECALLS = (1, 5, 10)


def places(scores: jax.Array, right: jax.Array) -> jax.Array:
    """Where the right one of each query stands, [N] int32: 0 is first.

    `scores` [N, M] are of N queries with M candidates, `right` [N] int32 names each query's own. Equal scores
    count against it, so that a constant score finds nothing.
    """
    own = jnp.take_along_axis(scores, right[:, None], axis=1)  # [N, 1]
    return (scores >= own).sum(axis=1) - 1


def recalls(found: np.ndarray) -> dict[str, float]:
    """{"r1", "r5", "r10"}: the share of `places` [N] among the first k."""
    return {f"r{k}": float(np.mean(found < k)) for k in RECALLS}


def clip_score(image: jax.Array, text: jax.Array) -> jax.Array:
    """100 times the cosine of embeddings of length 1, [B, E] each, at least 0: [B].

    Hessel et al. 2021 (arXiv:2104.08718), equation 1, with the weight 100 that published scores of generated
    images have in place of 2.5.
    """
    return 100.0 * jnp.maximum((image * text).sum(axis=1), 0.0)
