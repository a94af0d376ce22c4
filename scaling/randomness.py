"""Random keys: every random number is a function of (seed, step, purpose)."""

import zlib

import jax


def derive_key(rng: jax.Array, purpose: str) -> jax.Array:
    """Returns the key for one purpose."""
    return jax.random.fold_in(rng, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)
