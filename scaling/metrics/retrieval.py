"""Whether the right one of many is found, and how well pairs fit."""

import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import NotFinite

RECALLS = (1, 5, 10)


def places(scores: jax.Array, own: jax.Array) -> jax.Array:
    """Returns where the best of each query's own candidates stands among the others, [N] int32: 0 is first.

    `scores` [N, M] are of N queries with M candidates, `own` [N, M] says which are right. Equal scores count
    against them, so that a constant score finds nothing. A query with a score that is not finite has no
    place, which is -1: nothing is greater than NaN, and so it would be first.
    """
    best = jnp.where(own, scores, -jnp.inf).max(axis=1, keepdims=True)  # [N, 1]
    before = ((scores >= best) & ~own).sum(axis=1)
    return jnp.where(jnp.isfinite(scores).all(axis=1), before, -1)


def recalls(found: np.ndarray) -> dict[str, float]:
    """Returns {"r1", "r5", "r10"}: the share of `places` [N] among the first k.

    Raises: NotFinite for queries that have no place.
    """
    lost = int((found < 0).sum())
    if lost:
        raise NotFinite(f"recall: {lost} of {len(found)} queries have scores that are not finite")
    return {f"r{k}": float(np.mean(found < k)) for k in RECALLS}


def clip_score(image: jax.Array, text: jax.Array) -> jax.Array:
    """100 times the cosine of embeddings of length 1, [B, E] each, at least 0: [B].

    Hessel et al. 2021 (arXiv:2104.08718), equation 1, with the weight 100 that published scores of generated
    images have in place of 2.5.
    """
    return 100.0 * jnp.maximum((image * text).sum(axis=1), 0.0)
