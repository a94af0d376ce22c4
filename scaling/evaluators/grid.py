"""The evaluator that writes a picture of samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling.evaluators import autoencoder
from scaling.evaluators.base import CheckInterrupt, Evaluator
from scaling.evaluators.generate import diffusion_of, generate, sampler_of
from scaling.evaluators.image_grid import write_grid
from scaling.run.build import Run
from scaling.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Grid(Evaluator):
    """A picture of samples from fixed noise: the same noise in every run, so that runs compare."""

    samples: int = 64  # number of images in the picture
    batch_size: int = 64
    sampling: Sampling = field(default_factory=Sampling)

    def check(self, name: str, run: Run) -> None:
        super().check(name, run)
        sampler_of(self.sampling, diffusion_of(name, run), run, f"evaluators.{name}.sampling")
        autoencoder.decoder(run)  # raises if it is missing

    def run(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Any],
        folder: Path,
        step: int,
        check_interrupt: CheckInterrupt,
    ) -> dict[str, float]:
        """Writes `samples/step_<step>.png`; measures nothing."""
        batches = []
        for batch in generate(run, weights, self.sampling, self.samples, self.batch_size):
            check_interrupt()
            batches.append(np.asarray(batch.images))
        if jax.process_index() == 0:
            images = np.concatenate(batches)[: self.samples]
            write_grid(folder / "samples" / f"step_{step:08d}.png", images)
        return {}
