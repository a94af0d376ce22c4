"""Wrong captions for the images of a batch: any others of the global batch, or those like an image's own."""

import jax
import jax.numpy as jnp


def draw_others(
    rng: jax.Array, text: jax.Array, real: jax.Array, count: int, likeness: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws, for each row, `count` rows with another caption: indices int32 [B, count], and which exist.

    `text` is [B, L]; rows that are not `real` [B] are never drawn. Rows are drawn without replacement, with
    equal probability or in proportion to exp(`likeness` [B, B]) (by the Gumbel trick). If a row has fewer
    others, the second result is false there and the index arbitrary.
    """
    same = (text[:, None] == text[None]).all(axis=-1)  # [B, B]
    scores = jax.random.gumbel(rng, same.shape)
    if likeness is not None:
        scores = scores + likeness
    scores = jnp.where(same | ~real[None], -jnp.inf, scores)
    best, index = jax.lax.top_k(scores, count)
    return index, best > -jnp.inf


def shared_words(text: jax.Array, word: jax.Array, vocabulary: int) -> jax.Array:
    """Computes the cosine of captions' bags of tokens, [B, B] in [0, 1], from `text` and `word` [B, L].

    It measures, without a network, how hard a wrong caption is: an image is more easily told from captions
    that share no word with its own.
    """
    rows = jnp.arange(len(text))[:, None]
    bags = jnp.zeros((len(text), vocabulary)).at[rows, text].max((word >= 0).astype(jnp.float32))  # [B, V]
    bags = bags / jnp.sqrt(jnp.maximum(bags.sum(axis=1, keepdims=True), 1.0))
    return bags @ bags.T
