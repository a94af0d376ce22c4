"""What all evaluators share."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from scaling.data import Data, eval_batches, open_source, tokenizer_of
from scaling.data.options import image_shape
from scaling.data.pipeline import eval_rows
from scaling.engine import sharding
from scaling.engine.build import Built, data_of
from scaling.errors import NotFinite, UserError

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
        require_tokenizer(built)
        given = getattr(self, "data", {})  # of an evaluator that has images of its own
        images = data_of(built, given, f"evaluate.{name}.data")
        for key in ("fit_split", "split"):
            if hasattr(self, key) and images.name != "latents":  # these have one shape in every split
                require_images(images, getattr(self, key), built.image_shape, f"evaluate.{name}.{key}")

    def place(self, name: str, built: Built) -> NamedSharding:
        return sharding.batch_sharding(built.mesh, self.batch_size, f"evaluate.{name}.batch_size")

    def batches(
        self, name: str, built: Built, split: str, images: Data | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Every example of a split once, of the run's own data or of `images`; see `eval_batches`."""
        return eval_batches(images or built.config.data, split, self.batch_size, self.place(name, built))


def measured(
    name: str,
    evaluator: Any,
    built: Built,
    weights: Mapping[str, Any],
    folder: Path,
    step: int,
    pulse: Pulse,
) -> dict[str, float]:
    """Returns what an evaluator measures of these weights, by metric.

    Raises: UserError, naming the evaluator and the metric, for what is not finite.
    """
    try:
        values: dict[str, float] = evaluator.run(name, built, weights, folder, step, pulse)
        for metric, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"{metric}={value}")
    except NotFinite as e:
        raise NotFinite(f"evaluate.{name}: step {step}: {e}; look at the weights and the images") from None
    return values


def require_tokenizer(built: Built) -> None:
    """Raises UserError where captions would become other tokens than those that a run's model has learned."""
    known = built.info.text
    if known is None or not known.digest:
        return
    now = tokenizer_of(built.config.data).info
    if now != known:
        raise UserError(
            f"data.text: gives {now.vocabulary} tokens by a tokenizer of digest {now.digest}, and the run "
            f"has {known.vocabulary} of {known.digest}; put the vocabulary back that it was trained with"
        )


def require_images(images: Data, split: str, seen: tuple[int, ...], key: str) -> None:
    """Reads the first example of a split, as evaluation does, before hours are spent on training.

    Raises: UserError, naming `key`, for a split that is not there or has images of another shape than a model
    has `seen`; and for an example that cannot be read or has no label where its set has labels.
    """
    try:
        source = open_source(images, split)
        shape = image_shape(images, source)
        if shape == seen:
            first = eval_rows(0, source, images, 1, np.zeros(1, np.int64))
            shape = first["image"].shape[1:]
    except UserError as e:
        raise UserError(f"{key}={split!r}: {e}") from None
    if shape != seen:
        raise UserError(
            f"{key}={split!r}: images of {source.name} are {shape}, and the model sees {seen}; make them one "
            "size, or set data.image_size, and a crop in data.augment and data.eval_transforms"
        )
