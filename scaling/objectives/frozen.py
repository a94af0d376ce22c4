"""The objective of weights that are used as they are: nothing is minimised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from scaling.objectives.base import NO_HELPERS, Batch, Helpers


@dataclass(frozen=True)
class Frozen:
    """An objective without a loss: the model's weights are imported, to be exported or to help other runs.

    It has no data: a batch is the model's own arguments by name, in the shapes that its variant is made for.
    """

    model: nn.Module

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model for arguments of these shapes."""
        arguments: Mapping[str, Any] = batch
        return self.model.init(rng, **arguments)
