"""The integrators against diffusers' schedulers, and against the exact flow of Gaussian data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from scaling.diffusion import PATHS, Chain, Point, estimates
from scaling.sampling.integrators import INTEGRATORS, Denoise, Denoised

LINEAR = PATHS["ddpm-linear"]
assert isinstance(LINEAR, Chain)
SHAPE = (3, 4, 4, 2)
MEAN, STD = 0.3, 0.5  # of the Gaussian data


def _network(x: np.ndarray | jax.Array, t: float | jax.Array, lib: object) -> tuple:
    """Some smooth function of x and the original time: a prediction, and a raw variance in (-1, 1)."""
    phase = t * 0.001
    out = lib.tanh(0.8 * x + lib.sin(3.0 * x + phase)) * (0.5 + 0.5 * phase)  # type: ignore[attr-defined]
    return out, lib.cos(2.0 * x - phase)  # type: ignore[attr-defined]


def _denoise(prediction: str, clip: bool, learned: bool) -> Denoise:
    def denoise(x_t: jax.Array, time: jax.Array, point: Point) -> Denoised:
        output, raw = _network(x_t, time, jnp)
        x, eps = estimates(prediction, output, x_t, point)
        if clip:
            x, eps = estimates("x", jnp.clip(x, -1.0, 1.0), x_t, point)
        return Denoised(x, eps, raw if learned else None)

    return denoise


def _reference(
    scheduler: DDPMScheduler | DDIMScheduler, times: list[int], x: np.ndarray, **options: object
) -> tuple:
    """The scheduler's own loop in float64, and the noise that it drew at each of its steps."""
    generator = torch.Generator()
    current, drawn = torch.from_numpy(x), []
    for step, t in zip(scheduler.timesteps.tolist(), times, strict=True):
        output, raw = (torch.from_numpy(a) for a in _network(current.numpy(), float(t), np))
        if getattr(scheduler, "variance_type", "") == "learned_range":
            output = torch.cat([output, raw], dim=1)
        generator.manual_seed(step)
        # diffusers draws in the shape of the scheduler's input; see that ours adds the same.
        noise = torch.randn(current.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        drawn.append(noise.numpy())
        if isinstance(scheduler, DDPMScheduler):
            options["generator"] = generator
        current = scheduler.step(output, step, current, **options).prev_sample
    return current.numpy(), np.stack(drawn)


def _noise_of(drawn: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    table = jnp.asarray(drawn[::-1].copy(), jnp.float32)  # the schedulers count down, as we do
    return lambda i: table[i]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize(
    ("variance", "steps"), [("learned_range", 10), ("fixed_large", 10), ("learned_range", 250)]
)
def test_ddpm_matches_diffusers(prediction: str, clip: bool, variance: str, steps: int) -> None:
    names = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}
    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type=variance, timestep_spacing="linspace",
        clip_sample=clip, prediction_type=names[prediction],
    )  # fmt: skip
    scheduler.alphas_cumprod = torch.from_numpy(LINEAR.alpha_bar)  # a float64 reference
    scheduler.set_timesteps(steps)
    x = np.random.default_rng(steps).normal(size=SHAPE)
    expected, drawn = _reference(scheduler, scheduler.timesteps.tolist(), x)
    denoise = _denoise(prediction, clip, variance == "learned_range")
    ours = INTEGRATORS["ddpm"](denoise, LINEAR, steps, jnp.asarray(x, jnp.float32), _noise_of(drawn))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [10, 1000])
def test_ddim_matches_diffusers(clip: bool, steps: int) -> None:
    chain = LINEAR.respaced(steps)
    scheduler = DDIMScheduler(num_train_timesteps=steps, trained_betas=chain.betas, clip_sample=clip)
    scheduler.alphas_cumprod = torch.from_numpy(chain.alpha_bar)
    scheduler.set_timesteps(steps)
    x = np.random.default_rng(steps).normal(size=SHAPE)
    times = chain.times[::-1].tolist()
    expected, drawn = _reference(scheduler, times, x, use_clipped_model_output=True)
    denoise = _denoise("eps", clip, learned=False)
    ours = INTEGRATORS["ddim"](denoise, LINEAR, steps, jnp.asarray(x, jnp.float32), _noise_of(drawn))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def _optimal(x_t: jax.Array, time: jax.Array, point: Point) -> Denoised:
    """E[x | x_t] for data N(MEAN, STD^2)."""
    rest = (x_t - point.alpha * MEAN) / (point.alpha**2 * STD**2 + point.sigma**2)
    return Denoised(MEAN + point.alpha * STD**2 * rest, point.sigma * rest, None)


def _none(i: jax.Array) -> jax.Array:
    return jnp.zeros(())


def _flowed(path: str, noise: jax.Array) -> jax.Array:
    """Where the exact probability flow takes noise: standardised values stay what they are."""
    if path == "straight":
        return MEAN + STD * noise
    alpha_bar = LINEAR.alpha_bar[-1]
    scale = np.sqrt(alpha_bar * STD**2 + 1.0 - alpha_bar)
    return MEAN + STD * (noise - np.sqrt(alpha_bar) * MEAN) / scale


def _error(integrator: str, path: str, steps: int) -> float:
    noise = jax.random.normal(jax.random.key(0), (64, 4, 4, 1))
    found = INTEGRATORS[integrator](_optimal, PATHS[path], steps, noise, _none)
    return float(jnp.abs(found - _flowed(path, noise)).max())


@pytest.mark.parametrize(
    ("integrator", "path", "order"),
    [("euler", "straight", 1), ("heun", "straight", 2),
     ("euler", "ddpm-linear", 1), ("ddim", "ddpm-linear", 1)],
)  # fmt: skip
def test_flows_converge_to_the_exact_one_at_their_order(integrator: str, path: str, order: int) -> None:
    coarse, fine = _error(integrator, path, 20), _error(integrator, path, 80)
    assert fine < 0.08
    assert coarse / fine == pytest.approx(4.0**order, rel=0.3)


@pytest.mark.parametrize("path", ["straight", "ddpm-linear"])
def test_heun_beats_euler_at_equal_steps_and_at_equal_evaluations(path: str) -> None:
    assert _error("heun", path, 40) < 0.1 * _error("euler", path, 40)
    assert _error("heun", path, 40) < 0.3 * _error("euler", path, 80)
