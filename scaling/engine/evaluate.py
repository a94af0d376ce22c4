"""What a run measures: named evaluators, each exact, each with its own data and sampling."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.engine import autoencoder, features, sharding, tracing
from scaling.engine.averages import averages
from scaling.engine.build import Built
from scaling.engine.evaluator import Evaluator, Pulse
from scaling.engine.images import write_grid
from scaling.engine.linear import Linear
from scaling.engine.matching import Matching
from scaling.engine.retrieval import Retrieval, ZeroShot
from scaling.engine.views import Views
from scaling.errors import NotFinite, UserError
from scaling.metrics import frechet
from scaling.objectives.diffusion import Diffusion
from scaling.objectives.vision_language import VisionLanguage
from scaling.sampling import Sampling, make_sampler, to_uint8


@dataclass(frozen=True, kw_only=True)
class Metrics(Evaluator):
    """The objective's own metrics over every example of a split, each counted once."""

    split: str = "test"

    def check(self, name: str, built: Built) -> None:
        if isinstance(built.task, VisionLanguage):
            raise UserError(f"evaluate.{name}.kind='metrics': must be matching, which reads wrong captions")
        super().check(name, built)

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_metric: value}, such as `val_top1`."""
        values = averages(built, weights, self.batches(name, built, self.split), pulse)
        return {f"{name}_{metric}": value for metric, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Frechet(Evaluator):
    """Fréchet distance between generated and real images, on features of a classifier trained here.

    Named for the data (`fd_mnist`), beside the distance between two halves of the real split
    (`fd_mnist_floor`). Classes are balanced: image i has label i modulo the number of classes.
    """

    classifier: str  # a run folder
    classifier_config: str  # what to train there if it is empty
    split: str = "train"
    samples: int = 1000
    batch_size: int = 250
    sampling: Sampling = field(default_factory=Sampling)

    def needs(self) -> list[tuple[str, str]]:
        return [(self.classifier_config, self.classifier)]

    def check(self, name: str, built: Built) -> None:
        task = _diffusion(name, built)
        classifier = features.load(self.classifier)
        seen, made = classifier.trained.built.image_shape, autoencoder.decoder(built).shape
        if seen != made:
            raise UserError(
                f"evaluate.{name}.classifier={self.classifier}: sees {seen}, and this run makes {made}"
            )
        try:
            frechet.require_samples(self.samples, classifier.dim)
        except UserError as e:
            raise UserError(f"evaluate.{name}.{e}") from None
        super().check(name, built)
        _sampler(self.sampling, task, built)

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{"fd_<data>": distance, "fd_<data>_floor": distance}."""
        classifier = features.load(self.classifier)
        real = classifier.real(self.split, autoencoder.images(built))
        made = frechet.GaussianStatistics(classifier.dim)
        for batch in generate(built, weights, self.sampling, self.samples, self.batch_size):
            pulse()
            made.update(classifier(batch)[: self.samples - made.count])
        metric = f"fd_{built.info.name}"
        distance = frechet.frechet_distance(made.mean, made.covariance, real.mean, real.cov)
        return {metric: distance, f"{metric}_floor": real.floor}


@dataclass(frozen=True, kw_only=True)
class Grid(Evaluator):
    """A picture of samples from fixed noise: the same noise in every run, so that runs compare."""

    samples: int = 64
    batch_size: int = 64
    sampling: Sampling = field(default_factory=Sampling)

    def check(self, name: str, built: Built) -> None:
        super().check(name, built)
        _sampler(self.sampling, _diffusion(name, built), built)
        autoencoder.decoder(built)  # raises where it is not there

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """Writes `samples/step_<step>.png`; measures nothing."""
        made = []
        for batch in generate(built, weights, self.sampling, self.samples, self.batch_size):
            pulse()
            made.append(np.asarray(batch))
        if jax.process_index() == 0:
            write_grid(folder / "samples" / f"step_{step:08d}.png", np.concatenate(made)[: self.samples])
        return {}


EVALUATORS: dict[str, Any] = {
    "metrics": Metrics,
    "frechet": Frechet,
    "grid": Grid,
    "linear": Linear,
    "matching": Matching,
    "retrieval": Retrieval,
    "zero_shot": ZeroShot,
    "views": Views,
}


def _diffusion(name: str, built: Built) -> Diffusion:
    if not isinstance(built.task, Diffusion):
        raise UserError(
            f"evaluate.{name}: generates images, which objective {built.config.objective.name} cannot"
        )
    return built.task


def _sampler(options: Sampling, task: Diffusion, built: Built) -> Any:
    return make_sampler(options, task, built.image_shape)


@lru_cache(maxsize=4)
def _generator(built: Built, options: Sampling, batch_size: int) -> Callable[..., Any]:
    """(params, the decoder's, first index) -> uint8 images [batch_size, H, W, C]; compiled once a run.

    It also tells how many are not finite, [].
    """
    sampler = _sampler(options, _diffusion("sampling", built), built)
    decode = autoencoder.decoder(built)
    place = sharding.batch_sharding(built.mesh, batch_size, "batch_size")
    classes = built.info.num_classes

    def images(params: Any, weights: Any, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        indices = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size, dtype=jnp.int32), place)
        made = decode(weights, sampler(params, indices, indices % classes))  # [N, H, W, C]
        bad = (~jnp.isfinite(made).all(axis=(1, 2, 3))).sum()  # as pixels they would be black
        return to_uint8(made), bad

    return tracing.whole(built.mesh, images)


def generate(
    built: Built, weights: Mapping[str, Any], options: Sampling, samples: int, batch_size: int
) -> Iterator[jax.Array]:
    """Batches of uint8 images [batch_size, H, W, C], on every process; the last one may run over.

    Image i depends only on (sampling seed, i), not on the batch size or the devices.

    Raises: NotFinite for images that the model does not make of numbers.
    """
    images, decoder = _generator(built, options, batch_size), autoencoder.decoder(built).params
    for start in range(0, samples, batch_size):
        made, bad = images(weights["params"], decoder, jnp.asarray(start, jnp.int32))
        if int(bad):
            raise NotFinite(f"samples: {int(bad)} of {batch_size} are not finite, from number {start} on")
        yield made
