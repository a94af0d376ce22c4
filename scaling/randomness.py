"""Keys: every random number is a function of (seed, step, what it is for)."""

import zlib

import jax


def stream(rng: jax.Array, purpose: str) -> jax.Array:
    """The key for one purpose."""
    return jax.random.fold_in(rng, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
