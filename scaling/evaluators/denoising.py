"""The evaluator of a diffusion objective on fixed examples, times and noise."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.objectives.base import Extras, scaled
from scaling.objectives.diffusion import Diffusion
from scaling.parallel import tracing
from scaling.randomness import derive_key
from scaling.run.build import Run, shared_by_runs


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss(Evaluator):
    """The loss of the first `examples` of a split, each at `times` even times with noise of its own.

    Examples, times and noise are the same in every run, whatever its seed, batch size and mesh, so that the
    values of two runs differ by the models alone: a law's metric with little noise.
    """

    split: str = "test"
    examples: int = 1024
    times: int = 8

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective is one of diffusion.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if not isinstance(run.objective, Diffusion):
            kind = run.config.objective.name
            raise UserError(
                f"evaluators.{name}.name='denoising_loss': measures diffusion, not {kind}; take metrics"
            )
        super().check(name, run, needed)

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return tuple(f"{name}_{metric}" for metric in ("loss", "loss_se", *self._by_time()))

    def _by_time(self) -> list[str]:
        return [f"loss_t{part}" for part in range(self.times)]

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement: the mean loss, its standard error over examples, and the loss by time."""
        step = _step(context.run, self.examples, self.times)

        def measure(weights: Weights, at: int) -> dict[str, float]:
            extras, total = context.extras(weights), None
            count = math.ceil(self.examples / self.batch_size)
            with contextlib.closing(self.batches(context, self.split)) as batches:
                for i, batch in enumerate(itertools.islice(batches, count)):
                    first = np.uint32(i * self.batch_size)
                    sums = jax.device_get(step(weights["params"], extras, batch, first))
                    total = sums if total is None else jax.tree.map(np.add, total, sums)
            return self._values(context.name, *(np.asarray(each, np.float64) for each in total or ()))

        return measure

    def _values(self, name: str, by_time: Any, squares: Any, count: Any) -> dict[str, float]:
        mean = float(by_time.mean() / count)
        variance = max(float(squares / count) - mean**2, 0.0) * count / max(count - 1, 1)
        values = {"loss": mean, "loss_se": math.sqrt(variance / count)}
        values |= {each: float(loss / count) for each, loss in zip(self._by_time(), by_time, strict=True)}
        return {f"{name}_{metric}": value for metric, value in values.items()}


@shared_by_runs
def _step(run: Run, examples: int, times: int) -> Callable[..., Any]:
    """Returns a function of a batch, and its first example's index, to sums over its examples."""
    objective = run.objective
    assert isinstance(objective, Diffusion)  # as check says
    positions = objective.trained_path.quantiles(times)
    key = derive_key(jax.random.key(0), "denoise")

    def sums(params: Any, extras: Extras, batch: Any, first: jax.Array) -> tuple[jax.Array, ...]:
        x = scaled(batch["image"])  # [B, ..., C]
        index = first + jnp.arange(x.shape[0], dtype=jnp.uint32)  # [B]
        real = (index < examples) & (batch["mask"] > 0)  # [B]
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        condition = objective.conditioning.of(batch, extras.helpers)

        def at(part: jax.Array) -> jax.Array:
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, part), x.shape[1:]))
            position = jnp.broadcast_to(positions[part], index.shape)
            losses = objective.errors(params, x, position, noise(keys), condition)["loss"]  # [B]
            return jnp.where(real, losses, 0.0)

        losses = jax.lax.map(at, jnp.arange(times))  # [T, B]
        return losses.sum(1), (losses.mean(0) ** 2).sum(), real.sum().astype(jnp.float32)

    return jax.jit(tracing.trace_on_mesh(run.mesh, sums))
