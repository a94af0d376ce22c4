"""What all evaluators share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding

from scaling.data import Data, eval_batches
from scaling.engine import sharding
from scaling.engine.build import Built

Pulse = Callable[[], None]  # called between batches; raises if the run was told to stop


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Each has `run(name, built, weights, folder, step, pulse)`, which gives {name_metric: value}."""

    every: str = "25 %"
    batch_size: int = 256

    def needs(self) -> list[tuple[str, str]]:
        """Runs that have to be there before: the config and the folder of each."""
        return []

    def check(self, name: str, built: Built) -> None:
        """Raises UserError for what this run cannot be measured by; `name` is what the config calls it."""
        self.place(name, built)

    def place(self, name: str, built: Built) -> NamedSharding:
        return sharding.batch_sharding(built.mesh, self.batch_size, f"evaluate.{name}.batch_size")

    def batches(
        self, name: str, built: Built, split: str, images: Data | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Every example of a split once, of the run's own data or of `images`; see `eval_batches`."""
        return eval_batches(images or built.config.data, split, self.batch_size, self.place(name, built))
