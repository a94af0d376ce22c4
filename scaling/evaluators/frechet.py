"""The Fréchet distance between generated and real images."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from scaling.data import Data
from scaling.errors import UserError
from scaling.evaluators import autoencoder
from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.evaluators.classifier_features import ClassifierFeatures, feature_width
from scaling.evaluators.features import FeatureNetwork, reference_stats
from scaling.evaluators.generate import diffusion_of, make_generator, sampler_of
from scaling.metrics import frechet
from scaling.metrics.kinds import FLOOR, STANDARD_ERROR
from scaling.run.build import Run, described_run
from scaling.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Frechet(Evaluator):
    """Fréchet distance between generated and real images, on features of a classifier trained here.

    Named for the data (`fd_mnist`), beside the distance between two halves of the real split
    (`fd_mnist_floor`), with its standard error over generated images (`fd_mnist_se`). Classes are balanced:
    image i has label i modulo the number of classes.
    """

    classifier: str  # run folder of the classifier
    classifier_config: str  # config to train there if the folder is empty
    split: str = "train"
    samples: int = 1000  # number of generated images
    batch_size: int = 250
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classifier.strip():
            raise UserError(f"classifier={self.classifier!r}: must be the folder of a run")

    def needs(self) -> list[tuple[str, str]]:
        return [(self.classifier_config, self.classifier)]

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the classifier fits the generated images, and that there are enough of them.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        objective, key = diffusion_of(name, run), f"evaluators.{name}"
        classifier = (needed or {}).get(self.classifier) or described_run(self.classifier)
        expected, generated = classifier.image_shape, autoencoder.decoded_shape(run)
        if expected != generated:
            raise UserError(
                f"{key}.classifier={self.classifier}: sees {expected}, and this run makes {generated}"
            )
        try:
            frechet.require_samples(self.samples, feature_width(classifier, self.classifier))
        except UserError as e:
            raise UserError(f"{key}.{e}") from None
        super().check(name, run, needed)
        sampler_of(self.sampling, objective, run, f"{key}.sampling")

    def images(self, name: str, run: Run) -> Data:
        """Returns the images that the run learns to generate, in pixels."""
        return autoencoder.images(run)

    def image_shape(self, run: Run) -> tuple[int, ...]:
        return autoencoder.decoded_shape(run)

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        metric = f"fd_{run.info.name}"
        return metric, f"{metric}{STANDARD_ERROR}", f"{metric}{FLOOR}"

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of the distance `fd_<data>`, its standard error, and the floor."""
        network: FeatureNetwork = ClassifierFeatures(self.classifier, context.run.mesh)
        generate = make_generator(context.run, self.sampling, self.batch_size, context.helpers.all())
        images = autoencoder.images(context.run)
        real = reference_stats(network, self.split, images, context.check_interrupt)
        metric = f"fd_{context.run.info.name}"

        def measure(weights: Weights, step: int) -> dict[str, float]:
            groups, done = [frechet.GaussianStatistics(network.dim) for _ in range(frechet.GROUPS)], 0
            for batch in generate(weights, self.samples):
                context.check_interrupt()
                rows = network(batch.images).pooled[: self.samples - done]
                for group, part in frechet.grouped(rows, done, self.samples):
                    groups[group].update(part)
                done += len(rows)
            distance, error = frechet.distance_and_error(groups, real.mean, real.cov)
            return {metric: distance, f"{metric}{STANDARD_ERROR}": error, f"{metric}{FLOOR}": real.floor}

        return measure
