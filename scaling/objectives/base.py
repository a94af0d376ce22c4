"""The protocol of objectives: a loss with exact metrics, independent of devices, data and optimisers."""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from scaling.preprocessing import SYMMETRIC

Params = Any  # a pytree of float32 arrays
Batch = Mapping[str, jax.Array]  # arrays [B, ...]; in evaluation with "mask" [B], 1 for a real example


@flax.struct.dataclass
class Extras:
    """Everything a loss may read that the optimiser does not train."""

    # Arrays that are not trained, such as BatchNorm's statistics.
    collections: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    # Numbers that sweeps vary.
    traced_hparams: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Loss:
    """A value to minimise, and metrics as sums with counts, so that they are exact with masks and shards."""

    value: jax.Array  # []
    sums: Mapping[str, jax.Array]
    counts: Mapping[str, jax.Array]
    collections: Mapping[str, Any] = flax.struct.field(default_factory=dict)


class Objective(Protocol):
    """A protocol: how to initialise the variables, and what to minimise."""

    def init(self, rng: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Initialises variables ({"params": ..., other collections}) for a batch of these shapes."""
        ...

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Computes the loss and its metrics over the global batch."""
        ...


# Scaling for models that generate or reconstruct images: pixels to [-1, 1]; latents stay as they are.
scaled = SYMMETRIC


def summarise(values: Mapping[str, jax.Array], batch: Batch, collections: Mapping[str, Any]) -> Loss:
    """Makes a `Loss` from values [B] per example, one of them "loss"; masked examples do not count.

    The value is the mean of "loss" over the real examples, 0 if there are none.
    """
    mask = batch.get("mask")
    real = jnp.ones(values["loss"].shape, bool) if mask is None else mask > 0
    count = real.sum().astype(jnp.float32)
    sums = {name: jnp.where(real, value, 0.0).sum() for name, value in values.items()}
    counts = dict.fromkeys(sums, count)
    return Loss(sums["loss"] / jnp.maximum(count, 1.0), sums, counts, collections)
