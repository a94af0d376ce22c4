"""Weights that are used as they are: nothing is minimised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from scaling.objectives.base import Batch


@dataclass(frozen=True)
class Frozen:
    """No loss: a model whose weights come from elsewhere, to be exported or to help other runs.

    Its batch is the model's own arguments by name, of the shapes that its variant is made for, and no data.
    """

    model: nn.Module

    def init(self, rng: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Variables of the model for arguments of these shapes."""
        arguments: Mapping[str, Any] = batch
        return self.model.init(rng, **arguments)
