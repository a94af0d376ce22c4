"""The evaluator that writes a picture of samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.evaluators.generate import diffusion_of, make_generator, sampler_of
from scaling.evaluators.image_grid import first_frames, write_grid
from scaling.run.build import Run
from scaling.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Grid(Evaluator):
    """A picture of samples from fixed noise: the same noise in every run, so that runs compare."""

    samples: int = 64  # number of images in the picture
    batch_size: int = 64
    sampling: Sampling = field(default_factory=Sampling)

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        super().check(name, run, needed)
        sampler_of(self.sampling, diffusion_of(name, run), run, f"evaluators.{name}.sampling")

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return ()

    def prepare(self, context: Context) -> Measure:
        """Returns a function that writes `samples/step_<step>.png`, and shows it in TensorBoard."""
        generate = make_generator(context.run, self.sampling, self.batch_size, context.helpers.all())

        def write(weights: Weights, step: int) -> dict[str, float]:
            batches = []
            for batch in generate(weights, self.samples):
                context.check_interrupt()
                batches.append(np.asarray(batch.images))
            if jax.process_index() == 0:
                images = np.concatenate(batches)[: self.samples]
                write_grid(context.folder / "samples" / f"step_{step:08d}.png", images)
                if context.pictures is not None:
                    context.pictures.write_picture(step, context.name, first_frames(images))
            return {}

        return write
