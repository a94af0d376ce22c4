"""What generates: integrators of a path, and guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from scaling.diffusion import PATHS, Chain, Path, Point, estimates
from scaling.errors import UserError
from scaling.sampling.guidance import guided
from scaling.sampling.integrators import INTEGRATORS, Denoised

# The number of the first noise beside those of steps, which count down to 0. So a seed begins with the same
# noise, whatever the steps, the integrator or the guidance.
FIRST = 2**31 - 1

Sampler = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Task(Protocol):
    """What a sampler needs of the diffusion objective."""

    @property
    def path(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def label_dropout(self) -> float: ...
    @property
    def null_label(self) -> int: ...
    def predict(
        self, params: Any, x_t: jax.Array, time: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]: ...


@dataclass(frozen=True)
class Sampling:
    """How to generate. DiT's figures are "ddpm" in 250 steps, unclipped, with `guidance_channels` 3.

    `guidance` 1 is none. `clip` holds each step's estimate of the data to [-1, 1]: for pixels, not latents.
    """

    integrator: Literal["ddpm", "ddim", "euler", "heun"] = "ddpm"
    steps: int = 250
    guidance: float = 1.0
    guidance_channels: int | None = None
    seed: int = 0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.integrator not in INTEGRATORS:
            raise UserError(f"integrator={self.integrator!r}: must be one of {', '.join(INTEGRATORS)}")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1")
        if self.guidance < 0.0:
            raise UserError(f"guidance={self.guidance}: must be at least 0 (1 is no guidance)")
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise UserError(
                f"guidance_channels={self.guidance_channels}: must be at least 1, or None for all"
            )


def make_sampler(options: Sampling, task: Task, shape: tuple[int, ...]) -> Sampler:
    """`(params, indices [N] int32, labels [N] int32) -> images [N, H, W, C] float32` in the data's range.

    For `jax.jit`: the whole loop runs on the device. Image i depends on (seed, i, label) alone: not on N, on
    its place in the batch, or on the devices. Raises UserError for options that do not fit the task or the
    shape [H, W, C].
    """
    path = _path(options, task, shape)
    integrate = INTEGRATORS[options.integrator]

    def sample(params: Any, indices: jax.Array, labels: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.seed), indices)  # [N]

        def noise(i: jax.Array) -> jax.Array:
            draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))
            return draw(keys)  # [N, H, W, C]

        predict = guided(
            lambda x, time, y: task.predict(params, x, time, y),
            labels, task.null_label, options.guidance, options.guidance_channels,
        )  # fmt: skip

        def denoise(x_t: jax.Array, time: jax.Array, point: Point) -> Denoised:
            output, raw = predict(x_t, time)
            x, eps = estimates(task.prediction, output, x_t, point)
            if options.clip:
                x, eps = estimates("x", jnp.clip(x, -1.0, 1.0), x_t, point)
            return Denoised(x, eps, raw)

        return integrate(denoise, path, options.steps, noise(jnp.int32(FIRST)), noise)

    return sample


def _path(options: Sampling, task: Task, shape: tuple[int, ...]) -> Path:
    path = PATHS[task.path]
    if isinstance(path, Chain):
        path.respaced(options.steps)  # raises where there are too few or too many
    elif options.integrator in ("ddpm", "ddim"):
        raise UserError(
            f"integrator={options.integrator!r}: path={task.path!r} is continuous; use 'euler' or 'heun'"
        )
    if options.guidance != 1.0 and task.label_dropout == 0.0:
        raise UserError(
            f"guidance={options.guidance}: with label_dropout=0 no null label was trained; use guidance=1"
        )
    if options.guidance_channels is not None and options.guidance_channels > shape[-1]:
        raise UserError(
            f"guidance_channels={options.guidance_channels}: images have {shape[-1]} channels; use no more"
        )
    return path if task.prediction == "v" and not options.clip else path.trimmed()


def to_uint8(x: jax.Array) -> jax.Array:
    """Images in [-1, 1] as uint8, truncating clamp(127.5 x + 128, 0, 255) as DiT's sampling does."""
    return jnp.clip(127.5 * x + 128.0, 0.0, 255.0).astype(jnp.uint8)
