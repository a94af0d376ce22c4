"""The Fréchet distance between generated and real images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.evaluators import autoencoder, classifier_features
from scaling.evaluators.base import CheckInterrupt, Evaluator
from scaling.evaluators.generate import diffusion_of, generate, sampler_of
from scaling.metrics import frechet
from scaling.run.build import Run
from scaling.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Frechet(Evaluator):
    """Fréchet distance between generated and real images, on features of a classifier trained here.

    Named for the data (`fd_mnist`), beside the distance between two halves of the real split
    (`fd_mnist_floor`). Classes are balanced: image i has label i modulo the number of classes.
    """

    classifier: str  # run folder of the classifier
    classifier_config: str  # config to train there if the folder is empty
    split: str = "train"
    samples: int = 1000  # number of generated images
    batch_size: int = 250
    sampling: Sampling = field(default_factory=Sampling)

    def needs(self) -> list[tuple[str, str]]:
        return [(self.classifier_config, self.classifier)]

    def check(self, name: str, run: Run) -> None:
        """Checks also that the classifier fits the generated images, and that there are enough of them.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        objective = diffusion_of(name, run)
        classifier = classifier_features.load(self.classifier)
        expected, generated = classifier.restored.run.image_shape, autoencoder.decoder(run).shape
        if expected != generated:
            raise UserError(
                f"evaluators.{name}.classifier={self.classifier}: sees {expected}, "
                f"and this run makes {generated}"
            )
        try:
            frechet.require_samples(self.samples, classifier.dim)
        except UserError as e:
            raise UserError(f"evaluators.{name}.{e}") from None
        autoencoder.images(run)  # raises for a description that cannot be read
        super().check(name, run)
        sampler_of(self.sampling, objective, run, f"evaluators.{name}.sampling")

    def run(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Any],
        folder: Path,
        step: int,
        check_interrupt: CheckInterrupt,
    ) -> dict[str, float]:
        """Returns {"fd_<data>": distance, "fd_<data>_floor": distance}."""
        classifier = classifier_features.load(self.classifier)
        real = classifier.real(self.split, autoencoder.images(run))
        generated = frechet.GaussianStatistics(classifier.dim)
        for batch in generate(run, weights, self.sampling, self.samples, self.batch_size):
            check_interrupt()
            generated.update(classifier(batch.images)[: self.samples - generated.count])
        metric = f"fd_{run.info.name}"
        distance = frechet.frechet_distance(generated.mean, generated.covariance, real.mean, real.cov)
        return {metric: distance, f"{metric}_floor": real.floor}
