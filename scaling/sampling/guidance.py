"""Classifier-free guidance with the null condition."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scaling.models.conditioning import Condition, interleaved

# (x [N, ..., C], time [N], condition) -> prediction and raw variance, each [N, ..., C]
Predict = Callable[[jax.Array, jax.Array, Condition], tuple[jax.Array, jax.Array | None]]


def guided(
    predict: Predict, condition: Condition, null: Condition, scale: float, channels: int | None
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Returns `(x [N, ..., C], time []) -> prediction, raw variance`, guided towards N conditions.

    The first `channels` channels, or all if None, are null + scale (conditional - null) (Ho and Salimans
    2022, arXiv:2207.12598, with scale = 1 + w): DiT's published figures guide 3 of the 4 latent channels. The
    other channels and the variance are those of the condition. Both predictions come from one batch with the
    same x; with a scale of 1 there is only that of the condition.
    """
    if scale == 1.0:
        return lambda x, time: predict(x, jnp.broadcast_to(time, x.shape[:1]), condition)
    # The halves alternate, so that a batch sharded over devices needs no exchange between them.
    both = interleaved(condition, null)  # arrays [2N, ...]

    def call(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        twice = jnp.repeat(x, 2, axis=0)  # [2N, ..., C]
        output, raw = predict(twice, jnp.broadcast_to(time, twice.shape[:1]), both)
        cond, uncond = output[0::2], output[1::2]  # [N, ..., C]
        mixed = uncond + scale * (cond - uncond)
        if channels is not None:
            mixed = jnp.concatenate([mixed[..., :channels], cond[..., channels:]], axis=-1)
        return mixed, None if raw is None else raw[0::2]

    return call
