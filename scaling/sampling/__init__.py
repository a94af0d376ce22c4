"""Samplers: integrators of a path, and guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from scaling.diffusion import PATHS, Chain, Path, Point, estimates
from scaling.errors import UserError
from scaling.models.conditioning import Condition, Conditioning
from scaling.sampling.guidance import guided
from scaling.sampling.integrators import INTEGRATORS, Denoised

# Number of the first noise; the noises of the steps count down to 0. So a seed starts from the same noise,
# whatever the steps, the integrator or the guidance.
FIRST = 2**31 - 1

Sampler = Callable[[Any, jax.Array, Condition], jax.Array]


class Denoiser(Protocol):
    """The part of the diffusion objective that a sampler needs."""

    @property
    def path(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def condition_dropout(self) -> float: ...
    @property
    def conditioning(self) -> Conditioning: ...
    def predict(
        self, params: Any, x_t: jax.Array, time: jax.Array, condition: Condition
    ) -> tuple[jax.Array, jax.Array | None]: ...


@dataclass(frozen=True)
class Sampling:
    """Options of a sampler. DiT's figures are for "ddpm" in 250 steps, unclipped, with `guidance_channels` 3.

    `clip_denoised` is for pixels, not latents. `decode_tile` bounds the memory of decoding large images
    (`models.vae.tiled_decode`).
    """

    integrator: Literal["ddpm", "ddim", "euler", "heun"] = "ddpm"
    steps: int = 250  # number of integration steps
    guidance_scale: float = 1.0  # scale of classifier-free guidance; 1 is none
    guidance_channels: int | None = None  # number of first channels that are guided; None for all
    seed: int = 0  # noise seed
    clip_denoised: bool = False  # whether each step's estimate of the data is clipped to [-1, 1]
    decode_tile: int | None = None  # side in latents of tiles that are decoded one by one; None for no tiles
    condition_split: str = ""  # split whose examples' conditions samples take in order; "": classes in turn

    def __post_init__(self) -> None:
        if self.integrator not in INTEGRATORS:
            raise UserError(f"integrator={self.integrator!r}: must be one of {', '.join(INTEGRATORS)}")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be in [0, 2^31)")
        if self.guidance_scale < 0.0:
            raise UserError(f"guidance_scale={self.guidance_scale}: must be at least 0 (1 is no guidance)")
        if self.decode_tile is not None and self.decode_tile < 1:
            raise UserError(f"decode_tile={self.decode_tile}: must be at least 1, or None for no tiles")
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise UserError(
                f"guidance_channels={self.guidance_channels}: must be at least 1, or None for all"
            )


def make_sampler(options: Sampling, objective: Denoiser, shape: tuple[int, ...]) -> Sampler:
    """Returns `(params, indices [N] int32, condition) -> samples [N, *shape] float32`, for `jax.jit`.

    Samples, images [H, W, C] or clips [T, H, W, C], are in the data's range. The whole loop runs on the
    device. Sample i depends on (seed, i, its condition) alone: not on N, on its place in the batch, or on the
    devices.

    Raises:
        UserError: for options that do not fit the objective or the shape.
    """
    path = _path(options, objective, shape)
    integrate = INTEGRATORS[options.integrator]

    def sample(params: Any, indices: jax.Array, condition: Condition) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.seed), indices)  # [N]

        def noise(i: jax.Array) -> jax.Array:
            draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))
            return draw(keys)  # [N, *shape]

        predict = guided(
            lambda x, time, condition: objective.predict(params, x, time, condition),
            condition, objective.conditioning.null(condition),
            options.guidance_scale, options.guidance_channels,
        )  # fmt: skip

        def denoise(x_t: jax.Array, time: jax.Array, point: Point) -> Denoised:
            output, raw = predict(x_t, time)
            x, eps = estimates(objective.prediction, output, x_t, point)
            if options.clip_denoised:
                x, eps = estimates("x", jnp.clip(x, -1.0, 1.0), x_t, point)
            return Denoised(x, eps, raw)

        return integrate(denoise, path, options.steps, noise(jnp.int32(FIRST)), noise)

    return sample


def _path(options: Sampling, objective: Denoiser, shape: tuple[int, ...]) -> Path:
    """Returns the path to integrate, once the options are checked."""
    path = PATHS[objective.path]
    if isinstance(path, Chain):
        path.respaced(options.steps)  # raises if there are too few or too many steps
    elif options.integrator in ("ddpm", "ddim"):
        raise UserError(
            f"integrator={options.integrator!r}: path={objective.path!r} is continuous; use 'euler' or 'heun'"
        )
    if options.guidance_scale != 1.0 and objective.condition_dropout == 0.0:
        raise UserError(
            f"guidance_scale={options.guidance_scale}: with condition_dropout=0 no null condition was "
            "trained; use guidance_scale=1"
        )
    if options.guidance_channels is not None and options.guidance_channels > shape[-1]:
        raise UserError(
            f"guidance_channels={options.guidance_channels}: samples have {shape[-1]} channels; use no more"
        )
    return path if objective.prediction == "v" and not options.clip_denoised else path.trimmed()


def to_uint8(x: jax.Array) -> jax.Array:
    """Converts images in [-1, 1] to uint8, truncating clamp(127.5 x + 128, 0, 255) as DiT's sampling does."""
    return jnp.clip(127.5 * x + 128.0, 0.0, 255.0).astype(jnp.uint8)
