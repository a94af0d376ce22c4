"""Retrieval metrics: whether the right one of many candidates is found, and how well pairs fit."""

import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import NotFinite

RECALLS = (1, 5, 10)


def places(scores: jax.Array, own: jax.Array) -> jax.Array:
    """Returns the place of each query's best own candidate among the others, [N] int32, where 0 is first.

    `scores` [N, M] are those of N queries with M candidates; `own` [N, M] marks the right ones. Ties count
    against the right ones, so that a constant score finds nothing. The place of a query with a score that is
    not finite is -1: nothing is greater than NaN, so that its candidate would be first.
    """
    best = jnp.where(own, scores, -jnp.inf).max(axis=1, keepdims=True)  # [N, 1]
    before = ((scores >= best) & ~own).sum(axis=1)
    return jnp.where(jnp.isfinite(scores).all(axis=1), before, -1)


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """Returns {"r1", "r5", "r10"}: the share of ranks [N], as `places` gives them, among the first k.

    Raises:
        NotFinite: if a query has no place.
    """
    not_finite = int((ranks < 0).sum())
    if not_finite:
        raise NotFinite(f"recall: {not_finite} of {len(ranks)} queries have scores that are not finite")
    return {f"r{k}": float(np.mean(ranks < k)) for k in RECALLS}


def clip_score(image: jax.Array, text: jax.Array) -> jax.Array:
    """Returns 100 times the cosine of embeddings of length 1, [B, E] each, or 0 if it is negative: [B].

    Hessel et al. 2021 (arXiv:2104.08718), equation 1, with the weight 100, which published scores of
    generated images have, in place of 2.5.
    """
    return 100.0 * jnp.maximum((image * text).sum(axis=1), 0.0)
