"""Classifier-free guidance with the null label."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (x [N, H, W, C], time [N], labels [N]) -> prediction and raw variance, each [N, H, W, C]
Predict = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]


def guided(
    predict: Predict, labels: jax.Array, null: int, scale: float, channels: int | None
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Returns `(x [N, H, W, C], time []) -> prediction, raw variance`, guided towards labels [N].

    The first `channels` channels, or all if None, are null + scale (label - null) (Ho and Salimans 2022,
    arXiv:2207.12598, with scale = 1 + w): DiT's published figures guide 3 of the 4 latent channels. The other
    channels and the variance are those of the label. Both predictions come from one batch with the same x;
    with a scale of 1 there is only that of the label.
    """
    if scale == 1.0:
        return lambda x, time: predict(x, jnp.broadcast_to(time, labels.shape), labels)
    # The halves alternate, so that a batch sharded over devices needs no exchange between them.
    all_labels = jnp.stack([labels, jnp.full_like(labels, null)], axis=1).reshape(-1)  # [2N]

    def call(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        output, raw = predict(jnp.repeat(x, 2, axis=0), jnp.broadcast_to(time, all_labels.shape), all_labels)
        cond, uncond = output[0::2], output[1::2]  # [N, H, W, C]
        mixed = uncond + scale * (cond - uncond)
        if channels is not None:
            mixed = jnp.concatenate([mixed[..., :channels], cond[..., channels:]], axis=-1)
        return mixed, None if raw is None else raw[0::2]

    return call
