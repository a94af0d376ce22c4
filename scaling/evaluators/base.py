"""The base class of evaluators, and the checks that they share."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import NamedSharding

from scaling.data import Data, eval_batches, info, open_source, tokenizer_of
from scaling.data.options import image_shape
from scaling.data.pipeline import Batches, eval_rows
from scaling.errors import NotFinite, UserError
from scaling.objectives.base import Extras
from scaling.parallel import sharding
from scaling.run.build import Run
from scaling.run.helpers import RunHelpers
from scaling.run.options import check_period
from scaling.validation import parse_dataclass

CheckInterrupt = Callable[[], None]  # called between batches; it raises if the run was signalled to stop
Weights = Mapping[str, Any]  # {"params": ..., "collections": ...}
Measure = Callable[[Weights, int], dict[str, float]]  # (weights, step) -> {name_metric: value}


class Pictures(Protocol):
    """A place that shows pictures, such as TensorBoard."""

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None: ...


def never_interrupted() -> None:
    """Does nothing: a `CheckInterrupt` where no signal is caught."""


@dataclass(frozen=True)
class Context:
    """The run that an evaluator is prepared for, and what goes with it."""

    name: str  # the evaluator's name in the config
    run: Run
    folder: Path  # the run's folder, for pictures
    helpers: RunHelpers
    check_interrupt: CheckInterrupt = never_interrupted
    pictures: Pictures | None = None  # where training shows them, beside the files

    def extras(self, weights: Weights) -> Extras:
        """Returns what a loss may read beside the parameters."""
        return Extras(collections=weights["collections"], helpers=self.helpers.named())


@dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
    """The base of all evaluators: `check` before anything is trained, `prepare` once, measure at any step."""

    every: str = "25 %"  # duration between two evaluations
    batch_size: int = 256  # examples per batch, over all devices
    in_training: bool = True  # whether training stops to measure it; else `scaling evaluate --watch` does

    def __post_init__(self) -> None:
        check_period(self.every, "every")
        for option in dataclasses.fields(self):  # numbers of things, of all evaluators
            value = getattr(self, option.name)
            if type(value) is int and value < 1:
                raise UserError(f"{option.name}={value}: must be at least 1")

    def needs(self) -> list[tuple[str, str]]:
        """Returns the runs that have to be trained before it is prepared, as (config, folder)."""
        return []

    @abc.abstractmethod
    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        """Returns the names of the values that its measurement of a run gives, in any order."""

    @abc.abstractmethod
    def prepare(self, context: Context) -> Measure:
        """Reads what the measurement needs, and returns the function that measures weights at a step.

        What it compiles is compiled once, when it is first called.
        """

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks that this evaluator can measure the run; the runs that it needs may not be trained yet.

        `needed` has them, built, by folder; those that are left out are read from their folders.

        Raises:
            UserError: if it cannot.
        """
        self.batch_sharding(name, run)
        run.due(self.every, f"evaluators.{name}.every")
        require_tokenizer(run)
        images, shape = self.images(name, run), self.image_shape(run)
        for key, split in self.splits().items():
            require_images(images, split, shape, f"evaluators.{name}.{key}")

    def images(self, name: str, run: Run) -> Data:
        """Returns the data that it reads: the run's own, unless it has an option for others."""
        return run.config.data

    def image_shape(self, run: Run) -> tuple[int, ...]:
        """Returns the shape of the images that it reads, which are those that the run's model sees."""
        return run.image_shape

    def splits(self) -> dict[str, str]:
        """Returns the splits that it reads, by the options that name them."""
        options = (option.name for option in dataclasses.fields(self))
        return {name: getattr(self, name) for name in options if name in ("fit_split", "split")}

    def batch_sharding(self, name: str, run: Run) -> NamedSharding:
        return sharding.batch_sharding(run.mesh, self.batch_size, f"evaluators.{name}.batch_size")

    def batches(self, context: Context, split: str, images: Data | None = None) -> Batches:
        """Yields every example of a split once, of the run's own data or of `images`; see `eval_batches`.

        Raises:
            Exception: between two batches, what `context.check_interrupt` raises.
        """
        place = self.batch_sharding(context.name, context.run)
        for batch in eval_batches(images or context.run.config.data, split, self.batch_size, place):
            context.check_interrupt()
            yield batch


def prepare(evaluator: Evaluator, context: Context) -> Measure:
    """Prepares an evaluator, and has its measurement check that values are finite.

    Raises:
        NotFinite: from the returned function, if a value is not; it names the evaluator and the metric.
    """
    measure = evaluator.prepare(context)

    def _measure_finite(weights: Weights, step: int) -> dict[str, float]:
        try:
            values = measure(weights, step)
            for metric, value in values.items():
                if not math.isfinite(value):
                    raise NotFinite(f"{metric}={value}")
        except NotFinite as e:
            place = f"evaluators.{context.name}: step {step}"
            raise NotFinite(f"{place}: {e}; look at the weights and the images") from None
        return values

    return _measure_finite


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
        if not len(source):
            raise UserError(f"{source.name} has no example in it; name another split, or add examples")
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
