"""The protocol of objectives: a loss with exact metrics, independent of devices, data and optimisers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from scaling.preprocessing import SYMMETRIC

Params = Any  # a pytree of float32 arrays
Batch = Mapping[str, jax.Array]  # arrays [B, ...]; in evaluation with "mask" [B], 1 for a real example


@flax.struct.dataclass
class Helper:
    """A frozen model with its weights, which a loss or a condition may call: `helper(x)`."""

    variables: Mapping[str, Any]  # {"params": ..., other collections}, sharded over the run's mesh
    module: nn.Module = flax.struct.field(pytree_node=False)

    def __call__(self, *inputs: Any, method: str | None = None, **named: Any) -> Any:
        """Applies the model, or one of its methods."""
        return self.module.apply(self.variables, *inputs, method=method, **named)


Helpers = Mapping[str, Helper]  # by the names that the config gives them
NO_HELPERS: Helpers = MappingProxyType({})


@flax.struct.dataclass
class Extras:
    """Everything a loss may read that the optimiser does not train."""

    # Arrays that are not trained, such as BatchNorm's statistics.
    collections: Mapping[str, Any] = flax.struct.field(default_factory=dict)
    # Numbers that sweeps vary.
    traced_hparams: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    # Frozen models of other runs.
    helpers: Helpers = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Loss:
    """A value to minimise, and metrics as sums with counts, so that they are exact with masks and shards."""

    value: jax.Array  # []
    sums: Mapping[str, jax.Array]
    counts: Mapping[str, jax.Array]
    collections: Mapping[str, Any] = flax.struct.field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """A protocol: how to initialise the variables, and what to minimise."""

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises variables ({"params": ..., other collections}); only shapes are read."""
        ...

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Computes the loss and its metrics over the global batch."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """An objective, or a model, with features that a linear classifier or a distance can be measured on."""

    def features(self, *inputs: Any) -> jax.Array:
        """Computes features [B, D]."""
        ...


@runtime_checkable
class HasLogits(Protocol):
    """An objective that classifies."""

    def logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Computes logits [B, K]."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """An objective that bounds its parameters after each update."""

    def bounded(self, params: Params) -> Params:
        """Returns the parameters within their bounds."""
        ...


@runtime_checkable
class OnePass(Protocol):
    """An objective whose loss takes several passes of the model, and that says what one is."""

    def forward(self, params: Params, extras: Extras, batch: Batch) -> Any:
        """Computes one pass, whose multiply-adds are the `gmacs` of a run."""
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
