"""Masked modelling: which words of captions and patches of images are hidden, and what replaces them."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from scaling.models.layers import patchify

# Shares of hidden tokens that become [MASK] and a random token; the rest stay (BERT, section 3.1).
REPLACED, RANDOM = 0.8, 0.1


def picked(draw: jax.Array, count: jax.Array, share: float) -> jax.Array:
    """Picks, of the first `count` [B] items of each row, those with the smallest `draw` [B, N]: bool [B, N].

    It picks round(share * count) items, and at least one if there is any.
    """
    wanted = jnp.round(share * count.astype(jnp.float32)).astype(jnp.int32)
    wanted = jnp.maximum(wanted, jnp.minimum(count, 1))  # [B]
    exists = jnp.arange(draw.shape[1])[None] < count[:, None]  # [B, N]
    rank = jnp.argsort(jnp.argsort(jnp.where(exists, draw, jnp.inf), axis=1), axis=1)
    return exists & (rank < wanted[:, None])


def whole_words(draw: jax.Array, word: jax.Array, share: float) -> jax.Array:
    """Returns which tokens to hide, bool [B, L]: those of the `picked` words, each with all of its tokens.

    `word` [B, L] int32 is the word that each token belongs to, -1 for none; `draw` [B, L] is uniform.
    """
    chosen = picked(draw, word.max(axis=1) + 1, share)  # [B, L], by word
    of_token = jnp.take_along_axis(chosen, jnp.maximum(word, 0), axis=1)
    return (word >= 0) & of_token


def corrupted(rng: jax.Array, text: jax.Array, hide: jax.Array, mask: int, vocabulary: int) -> jax.Array:
    """Returns `text` [B, L]; hidden tokens become `mask` (80 %) or a random token (10 %), or stay (10 %)."""
    choice_key, token_key = jax.random.split(rng)
    choice = jax.random.uniform(choice_key, text.shape)
    random = jax.random.randint(token_key, text.shape, 0, vocabulary, text.dtype)
    replacement = jnp.where(choice < REPLACED, jnp.asarray(mask, text.dtype), random)
    return jnp.where(hide & (choice < REPLACED + RANDOM), replacement, text)


def own_draw(text: jax.Array, purpose: str, size: int) -> jax.Array:
    """Draws uniform numbers [B, size] that depend on each caption [B, L] and the purpose alone.

    With them, what evaluation hides depends neither on the batch nor on the run.
    """
    powers = np.cumprod(np.full(text.shape[1], 0x9E3779B1, np.uint32), dtype=np.uint32)
    digest = (text.astype(jnp.uint32) * powers[None]).sum(axis=1, dtype=jnp.uint32)  # [B], modulo 2^32
    key = jax.random.key(zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
    return jax.vmap(lambda seed: jax.random.uniform(jax.random.fold_in(key, seed), (size,)))(digest)


def mean_colours(image: jax.Array, patch: int) -> jax.Array:
    """Returns the patches' mean colours in 256 levels, int32 [B, M, C], of images [B, H, W, C] in [-1, 1]."""
    pixels = patchify(image, patch)  # [B, M, patch * patch * C], channel fastest
    mean = pixels.reshape(*pixels.shape[:2], patch**2, image.shape[-1]).mean(axis=2)  # [B, M, C]
    return jnp.clip(jnp.round((mean + 1.0) * 127.5), 0, 255).astype(jnp.int32)
