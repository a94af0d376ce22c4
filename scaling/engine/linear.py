"""What a linear classifier makes of the data: of its pixels, or of the features that a model has learned."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from scaling.data import Data, host_batches, info, open_source
from scaling.engine import tracing
from scaling.engine.build import Built, data_of
from scaling.engine.evaluator import Evaluator, Pulse
from scaling.errors import NotFinite, UserError
from scaling.objectives.base import Extras


@dataclass(frozen=True, kw_only=True)
class Linear(Evaluator):
    """Logistic regression, fitted on one split and scored on another; every example of both counts once.

    On "pixels" it is the baseline that a model has to beat: it needs no model, and one measurement will do.
    On "features", those that a model's head sees, it is a linear probe (Radford et al. 2021, "CLIP", section
    3.2). Inputs are those of evaluation, less their mean, pixels in [0, 1]. Fitted by scikit-learn's L-BFGS
    until it converges, or for `iterations`.
    """

    on: Literal["pixels", "features"] = "pixels"
    data: dict[str, Any] = field(default_factory=dict)  # labelled images, where the run's own are not
    every: str = "100 %"
    fit_split: str = "train"
    split: str = "test"
    c: float = 1.0  # the inverse of the strength of L2, scikit-learn's C
    iterations: int = 1000

    def __post_init__(self) -> None:
        if self.c <= 0.0:
            raise UserError(f"c={self.c}: must be greater than 0")
        if self.iterations < 1:
            raise UserError(f"iterations={self.iterations}: must be at least 1")

    def check(self, name: str, built: Built) -> None:
        images = self._images(name, built)
        for split in (self.fit_split, self.split):
            open_source(images, split)  # raises where it is not there
        if not info(images).num_classes:
            raise UserError(f"evaluate.{name}.data: {images.name} has no labels; name images that have")
        super().check(name, built)
        able = hasattr(built.task, "features") and hasattr(built.model, "features")
        if self.on == "features" and not able:
            raise UserError(
                f"evaluate.{name}.on='features': objective {built.config.objective.name} with "
                f"{built.config.model.name} has none; give on='pixels'"
            )

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_top1: accuracy}, such as `linear_top1`."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        images = self._images(name, built)
        (x, labels), (test_x, test_labels) = (
            self._examples(images, built, weights, split, pulse) for split in (self.fit_split, self.split)
        )
        mean = x.mean(axis=0)
        model = LogisticRegression(C=self.c, max_iter=self.iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` says when to stop
            model.fit(x - mean, labels)
        return {f"{name}_top1": float(model.score(test_x - mean, test_labels))}

    def _images(self, name: str, built: Built) -> Data:
        return data_of(built, self.data, f"evaluate.{name}.data")

    def _examples(
        self, images: Data, built: Built, weights: Mapping[str, Any], split: str, pulse: Pulse
    ) -> tuple[np.ndarray, np.ndarray]:
        """(x float64 [N, D], labels [N]) of a split, the same on every process."""
        pixels = self.on == "pixels"
        read = self._pixels(images, split) if pixels else self._features(images, built, weights, split)
        found = []
        for x, label, mask in read:
            pulse()
            real = mask > 0
            found.append((x[real], label[real]))
        rows, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        if bad:
            raise NotFinite(f"{self.on}: those of {bad} of {len(rows)} images are not finite")
        return rows.astype(np.float64), labels

    def _pixels(self, images: Data, split: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        cfg = dataclasses.replace(images, workers=0)  # to start them takes longer
        source = open_source(cfg, split)
        starts = range(0, len(source), self.batch_size)
        for batch in host_batches(cfg, source, starts, self.batch_size):
            image = batch["image"]
            pixels = image / 255.0 if image.dtype == np.uint8 else image
            yield pixels.reshape(len(image), -1), batch["label"], batch["mask"]

    def _features(
        self, images: Data, built: Built, weights: Mapping[str, Any], split: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        extras = Extras(collections=weights["collections"])
        forward = _forward(built)
        for batch in self.batches("", built, split, images):
            yield jax.device_get(forward(weights["params"], extras, batch))


@lru_cache(maxsize=1)
def _forward(built: Built) -> Callable[..., Any]:
    """(params, extras, batch) -> features, labels and mask of the whole batch on every process."""
    task: Any = built.task

    def forward(params: Any, extras: Extras, batch: Any) -> Any:
        return task.features(params, extras, batch), batch["label"], batch["mask"]

    return tracing.whole(built.mesh, forward)
