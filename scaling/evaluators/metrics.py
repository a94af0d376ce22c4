"""The evaluator of the objective's own metrics over a split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.evaluators.base import CheckInterrupt, Evaluator
from scaling.evaluators.mean_metrics import mean_metrics
from scaling.objectives.vision_language import VisionLanguage
from scaling.run.build import Run


@dataclass(frozen=True, kw_only=True)
class Metrics(Evaluator):
    """The objective's own metrics over every example of a split, each counted once."""

    split: str = "test"

    def check(self, name: str, run: Run) -> None:
        """Checks also that the objective needs no wrong captions.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if isinstance(run.objective, VisionLanguage):
            raise UserError(f"evaluators.{name}.name='metrics': must be matching, which reads wrong captions")
        super().check(name, run)

    def run(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Any],
        folder: Path,
        step: int,
        check_interrupt: CheckInterrupt,
    ) -> dict[str, float]:
        """Returns {name_metric: value}, such as `val_top1`."""
        values = mean_metrics(run, weights, self.batches(name, run, self.split), check_interrupt)
        return {f"{name}_{metric}": value for metric, value in values.items()}
