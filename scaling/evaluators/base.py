"""The base class of evaluators, and the checks that they share."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from scaling.data import Data, eval_batches, info, open_source, tokenizer_of
from scaling.data.options import image_shape
from scaling.data.pipeline import eval_rows
from scaling.errors import NotFinite, UserError
from scaling.parallel import sharding
from scaling.run.build import Run
from scaling.validation import parse_dataclass

CheckInterrupt = Callable[[], None]  # called between batches; it raises if the run was signalled to stop


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The base of all evaluators.

    Each has `run(name, run, weights, folder, step, check_interrupt)`, which returns {name_metric: value}.
    `name` is the evaluator's name in the config, everywhere.
    """

    every: str = "25 %"  # duration between two evaluations
    batch_size: int = 256  # examples per batch, over all devices

    def needs(self) -> list[tuple[str, str]]:
        """Returns the runs that have to be trained before, as (config, folder)."""
        return []

    def check(self, name: str, run: Run) -> None:
        """Checks that this evaluator can measure the run.

        Raises:
            UserError: if it cannot.
        """
        self.batch_sharding(name, run)
        require_tokenizer(run)
        section = getattr(self, "data", {})  # some evaluators have images of their own
        images = data_of(run, section, f"evaluators.{name}.data")
        for key in ("fit_split", "split"):
            if hasattr(self, key) and images.name != "latents":  # latents have one shape in every split
                require_images(images, getattr(self, key), run.image_shape, f"evaluators.{name}.{key}")

    def batch_sharding(self, name: str, run: Run) -> NamedSharding:
        return sharding.batch_sharding(run.mesh, self.batch_size, f"evaluators.{name}.batch_size")

    def batches(
        self, name: str, run: Run, split: str, images: Data | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Yields every example of a split once, of the run's own data or of `images`; see `eval_batches`."""
        return eval_batches(images or run.config.data, split, self.batch_size, self.batch_sharding(name, run))


def measured(
    name: str,
    evaluator: Any,
    run: Run,
    weights: Mapping[str, Any],
    folder: Path,
    step: int,
    check_interrupt: CheckInterrupt,
) -> dict[str, float]:
    """Runs an evaluator on these weights and returns its values by metric.

    Raises:
        NotFinite: if a value is not finite; it names the evaluator and the metric.
    """
    try:
        values: dict[str, float] = evaluator.run(name, run, weights, folder, step, check_interrupt)
        for metric, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"{metric}={value}")
    except NotFinite as e:
        raise NotFinite(f"evaluators.{name}: step {step}: {e}; look at the weights and the images") from None
    return values


def require_tokenizer(run: Run) -> None:
    """Checks that captions become the tokens that the run's model has learned.

    Raises:
        UserError: if the tokenizer is another one than in training.
    """
    learned = run.info.text
    if learned is None or not learned.digest:
        return
    current = tokenizer_of(run.config.data).info
    if current != learned:
        raise UserError(
            f"data.text: gives {current.vocabulary} tokens by a tokenizer of digest {current.digest}, "
            f"and the run has {learned.vocabulary} of {learned.digest}; "
            "put the vocabulary back that it was trained with"
        )


def require_images(images: Data, split: str, expected: tuple[int, ...], key: str) -> None:
    """Reads the first example of a split, as evaluation does, before hours are spent on training.

    Raises:
        UserError: for a split that does not exist, images of another shape than the model's, `expected`, an
            example that cannot be read, or a missing label where the set has labels; it names `key`.
    """
    try:
        source = open_source(images, split)
        shape = image_shape(images, source)
        if shape == expected:
            first = eval_rows(0, source, images, 1, np.zeros(1, np.int64))
            shape = first["image"].shape[1:]
    except UserError as e:
        raise UserError(f"{key}={split!r}: {e}") from None
    if shape != expected:
        raise UserError(
            f"{key}={split!r}: images of {source.name} are {shape}, and the model sees {expected}; make them "
            "one size, or set data.image_size, and a crop in data.train_transforms and data.eval_transforms"
        )


def data_of(run: Run, section: Mapping[str, Any], key: str) -> Data:
    """Returns the run's own data, or the data that a section of options names, cropped as the run's own are.

    Raises:
        UserError: for a wrong option, or images of another shape; it names `key`.
    """
    own = run.config.data
    if not section:
        return own
    crops = section.get("eval_transforms", own.eval_transforms)
    defaults = {"image_size": own.image_size, "eval_transforms": crops, "threads": own.threads}
    defaults["train_transforms"] = crops  # these data are only evaluated
    images: Data = parse_dataclass(Data, {**defaults, **section}, key)
    shape = info(images).image_shape
    if shape != run.image_shape:
        raise UserError(f"{key}: images are {shape}, and the model sees {run.image_shape}")
    return images
