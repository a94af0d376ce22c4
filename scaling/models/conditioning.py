"""Conditions of denoisers: what a model is told beside the noisy example and its time.

A condition is a pytree of arrays [B, ...], whatever the model's own embedder takes: a class, tokens with a
mask, a pooled vector, or several of them. A model says how its conditions are made in a field or property
`conditioning`; one without it embeds a class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from scaling.errors import UserError

Condition = Any  # a pytree of arrays [B, ...]


class Conditioning(Protocol):
    """How a denoiser's conditions are made."""

    def of(self, batch: Mapping[str, jax.Array], helpers: Mapping[str, Any]) -> Condition:
        """Returns the conditions of a batch's examples, for which it may call frozen helpers."""
        ...

    def null(self, condition: Condition) -> Condition:
        """Returns the null condition of guidance, which says nothing, in the shapes of `condition`."""
        ...


@dataclass(frozen=True)
class ClassLabel:
    """Conditioning on a class y [B] int32; the null label is row `num_classes` of the model's table."""

    num_classes: int

    def of(self, batch: Mapping[str, jax.Array], helpers: Mapping[str, Any]) -> jax.Array:
        """Returns the labels [B] of a batch.

        Raises:
            UserError: if the data have no labels.
        """
        if "label" not in batch:
            raise UserError("data: have no labels, and the model is conditioned on a class; choose others")
        return batch["label"]

    def null(self, condition: jax.Array) -> jax.Array:
        """Returns the null label, [B]."""
        return jnp.full_like(condition, self.num_classes)


@runtime_checkable
class Conditioned(Protocol):
    """A model that is conditioned on something else than a class."""

    @property
    def conditioning(self) -> Conditioning: ...


def conditioning_of(model: Any) -> Conditioning:
    """Returns the model's own conditioning, or that on one of its classes."""
    return model.conditioning if isinstance(model, Conditioned) else ClassLabel(int(model.num_classes))


def dropped(condition: Condition, null: Condition, drop: jax.Array) -> Condition:
    """Returns the condition with that of examples for which `drop` [B] is true replaced by `null`."""

    def choose(null: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.where(drop.reshape(-1, *(1,) * (given.ndim - 1)), null, given)

    return jax.tree.map(choose, null, condition)


def interleaved(condition: Condition, null: Condition) -> Condition:
    """Returns the conditions [2B, ...] in which each example's own is followed by the null one."""

    def join(given: jax.Array, null: jax.Array) -> jax.Array:
        return jnp.stack([given, null], axis=1).reshape(-1, *given.shape[1:])

    return jax.tree.map(join, condition, null)
