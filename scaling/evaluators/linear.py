"""Accuracy of a linear classifier on pixels, or on the features that a model has learned."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from scaling.data import Data, host_batches, info, open_source
from scaling.errors import NotFinite, UserError
from scaling.evaluators.base import CheckInterrupt, Context, Evaluator, Measure, Weights, data_of
from scaling.metrics.kinds import with_error_names, with_errors
from scaling.objectives.base import Extras, HasFeatures
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs

Batches = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]  # inputs [B, D], labels [B], mask [B]


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluator):
    """Logistic regression, fitted on one split and scored on another; every example of both counts once.

    On "pixels" it is the baseline that a model has to beat: it needs no model, and one measurement is enough.
    On "features", the input of a model's head, it is a linear probe (Radford et al. 2021, "CLIP", section
    3.2). Images are those of evaluation, pixels in [0, 1]; the mean input is subtracted. It is fitted by
    scikit-learn's L-BFGS until that converges, for at most `iterations`.
    """

    inputs: Literal["pixels", "features"] = "pixels"
    data: dict[str, Any] = field(default_factory=dict)  # options of labelled images; {} for the run's own
    every: str = "100 %"
    fit_split: str = "train"
    split: str = "test"
    inverse_l2: float = 1.0  # inverse strength of the L2 penalty, scikit-learn's C
    iterations: int = 1000  # maximum number of L-BFGS iterations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inverse_l2 <= 0.0:
            raise UserError(f"inverse_l2={self.inverse_l2}: must be greater than 0")

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that both splits exist and have labels, and that there are features to classify.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        super().check(name, run, needed)
        images = self.images(name, run)
        if not info(images).num_classes:
            raise UserError(f"evaluators.{name}.data: {images.name} has no labels; name images that have")
        has_features = isinstance(run.objective, HasFeatures) and isinstance(run.model, HasFeatures)
        if self.inputs == "features" and not has_features:
            raise UserError(
                f"evaluators.{name}.inputs='features': objective {run.config.objective.name} with "
                f"{run.config.model.name} has none; give inputs='pixels'"
            )

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return with_error_names([f"{name}_top1"])

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_top1: accuracy}, such as `linear_top1`, and its standard error."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        images = self.images(context.name, context.run)
        read = self._pixels if self.inputs == "pixels" else self._make_features(context)

        def measure(weights: Weights, step: int) -> dict[str, float]:
            (x, labels), (test_x, test_labels) = (
                self._examples(read(images, weights, split), context.check_interrupt)
                for split in (self.fit_split, self.split)
            )
            mean = x.mean(axis=0)
            model = LogisticRegression(C=self.inverse_l2, max_iter=self.iterations)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` may be the limit
                model.fit(x - mean, labels)
            accuracy = float(model.score(test_x - mean, test_labels))
            return with_errors({f"{context.name}_top1": accuracy}, len(test_labels))

        return measure

    def images(self, name: str, run: Run) -> Data:
        """Returns the labelled images that `data` names, or the run's own.

        Raises:
            UserError: for a wrong option, or images of another shape.
        """
        return data_of(run, self.data, f"evaluators.{name}.data")

    def _examples(self, batches: Batches, check_interrupt: CheckInterrupt) -> tuple[np.ndarray, np.ndarray]:
        """Returns (x float64 [N, D], labels [N]) of a split, the same on every process.

        Raises:
            NotFinite: if an input is not finite.
        """
        examples = []
        for x, label, mask in batches:
            check_interrupt()
            real = mask > 0
            examples.append((x[real], label[real]))
        rows, labels = (np.concatenate(column) for column in zip(*examples, strict=True))
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        if bad:
            raise NotFinite(f"{self.inputs}: those of {bad} of {len(rows)} images are not finite")
        return rows.astype(np.float64), labels

    def _pixels(self, images: Data, weights: Weights, split: str) -> Batches:
        cfg = dataclasses.replace(images, workers=0)  # starting workers takes longer than reading
        source = open_source(cfg, split)
        starts = range(0, len(source), self.batch_size)
        for batch in host_batches(cfg, source, starts, self.batch_size):
            image = batch["image"]
            pixels = image / 255.0 if image.dtype == np.uint8 else image
            yield pixels.reshape(len(image), -1), batch["label"], batch["mask"]

    def _make_features(self, context: Context) -> Callable[[Data, Weights, str], Batches]:
        forward = _forward(context.run)

        def features(images: Data, weights: Weights, split: str) -> Batches:
            extras = context.extras(weights)
            for batch in self.batches(context, split, images):
                yield jax.device_get(forward(weights["params"], extras, batch))

        return features


@shared_by_runs
def _forward(run: Run) -> Callable[..., Any]:
    """Returns a function (params, extras, batch) -> features, labels and mask of the batch, replicated."""
    objective: Any = run.objective

    def forward(params: Any, extras: Extras, batch: Any) -> Any:
        return objective.features(params, extras, batch), batch["label"], batch["mask"]

    return tracing.jit_replicated(run.mesh, forward)
