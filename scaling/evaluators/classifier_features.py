"""The features of a classifier that the package trained, as a feature network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import data
from scaling.errors import UserError
from scaling.evaluators.features import Features
from scaling.objectives.base import Extras, HasFeatures, HasLogits
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs
from scaling.run.restore import restore_run, weights_digest


class ClassifierFeatures:
    """The pooled features of a trained classifier, with its logits.

    Raises:
        UserError: if the run is not there, or has no features.
    """

    def __init__(self, folder: Path | str, mesh: jax.sharding.Mesh | None = None) -> None:
        self.folder = Path(folder)
        restored = restore_run(folder, mesh)
        run = restored.run
        self.dim = feature_width(run, folder)
        self.mesh = run.mesh
        self.images: data.Data | None = run.config.data
        self._weights = {k: restored.weights[k] for k in ("params", "collections")}
        self.identity = f"{weights_digest(self._weights)} {run.config.preprocessing}"
        self._apply = _make_forward(run)

    def __call__(self, images: jax.Array) -> Features:
        """Returns the features and logits of images uint8 [N, H, W, C], the same on every process."""
        pooled, logits = self._apply(self._weights, images)
        return Features(np.asarray(pooled, np.float64), None if logits is None else np.asarray(logits))


@shared_by_runs
def _make_forward(run: Run) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """Returns a function (weights, images) -> features [N, D], logits [N, K] or None; replicated."""
    return tracing.jit_replicated(run.mesh, lambda weights, x: _forward(run, weights, x))


def feature_width(run: Run, folder: Path | str) -> int:
    """Returns D of a classifier's features [N, D], for which it need not be trained.

    Raises:
        UserError: if the run has no features.
    """
    if not isinstance(run.objective, HasFeatures) or not isinstance(run.model, HasFeatures):
        raise UserError(
            f"classifier={folder}: is a run of {run.config.objective.name} with "
            f"{run.config.model.name}, which has no features; give that of a classifier"
        )
    collections = dict(run.variable_shapes)
    weights = {"params": collections.pop("params"), "collections": collections}
    pooled, _ = jax.eval_shape(lambda weights, x: _forward(run, weights, x), weights, run.batch(1)["image"])
    return int(pooled.shape[1])


def _forward(run: Run, weights: Any, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    objective: Any = run.objective
    inputs = weights["params"], Extras(collections=weights["collections"]), {"image": images}
    logits = objective.logits(*inputs) if isinstance(objective, HasLogits) else None
    return objective.features(*inputs), logits
