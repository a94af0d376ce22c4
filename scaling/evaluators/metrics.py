"""The evaluator of the objective's own metrics over a split."""

from collections.abc import Mapping
from dataclasses import dataclass

from scaling.errors import UserError
from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.evaluators.mean_metrics import mean_metrics, metric_names
from scaling.objectives.vision_language import VisionLanguage
from scaling.run.build import Run


@dataclass(frozen=True, kw_only=True)
class Metrics(Evaluator):
    """The objective's own metrics over every example of a split, each counted once."""

    split: str = "test"

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective needs no wrong captions.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if isinstance(run.objective, VisionLanguage):
            raise UserError(f"evaluators.{name}.name='metrics': must be matching, which reads wrong captions")
        super().check(name, run, needed)

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return tuple(f"{name}_{metric}" for metric in metric_names(run, run.batch(self.batch_size)))

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_metric: value}, such as `val_top1`."""
        mean = mean_metrics(context)

        def measure(weights: Weights, step: int) -> dict[str, float]:
            values = mean(weights, self.batches(context, self.split))
            return {f"{context.name}_{metric}": value for metric, value in values.items()}

        return measure
