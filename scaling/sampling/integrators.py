"""From noise to data: each integrator is one `lax.scan` over the steps.

An integrator takes `denoise(x_t [N, H, W, C], time [], point) -> Denoised`, a path, a number of steps, the
first noise x [N, H, W, C], and `noise(i []) -> [N, H, W, C]`, the fresh noise of step i; it returns the
sample [N, H, W, C].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.diffusion import Chain, Path, Point


class Denoised(NamedTuple):
    """What a model implies about x_t: the data, the noise, and the raw variance if learned ([N, H, W, C])."""

    x: jax.Array
    eps: jax.Array
    raw: jax.Array | None


Denoise = Callable[[jax.Array, jax.Array, Point], Denoised]
Noise = Callable[[jax.Array], jax.Array]


def ddpm(denoise: Denoise, path: Chain, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Ancestral sampling (Ho et al. 2020, alg. 2) on the respaced chain (Nichol and Dhariwal 2021, sec. 4),
    with the learned variance if there is one."""
    chain = path.respaced(steps)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        found = denoise(x_t, chain.time(i), chain.point(i))
        mean = chain.posterior_mean(i, found.x, x_t)
        sigma = jnp.exp(0.5 * chain.log_variance(i, found.raw))
        return mean + jnp.where(i > 0, sigma, 0.0) * noise(i), None  # the last step adds no noise

    return jax.lax.scan(step, x, jnp.arange(steps)[::-1])[0]


def ddim(denoise: Denoise, path: Chain, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Deterministic sampling (Song et al. 2021, arXiv:2010.02502, eq. 12, sigma 0) on the respaced chain."""
    chain = path.respaced(steps)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        found = denoise(x_t, chain.time(i), chain.point(i))
        alpha, sigma = chain.before(i)
        return alpha * found.x + sigma * found.eps, None

    return jax.lax.scan(step, x, jnp.arange(steps)[::-1])[0]


def euler(denoise: Denoise, path: Path, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """First-order integration of dx/dtau = v over the path's nodes: one evaluation a step."""
    nodes = path.nodes(steps)
    here = _some(nodes.time, nodes.point, slice(0, steps))

    def step(x_t: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        time, point, length = inputs
        return x_t + length * _velocity(denoise, x_t, time, point), None

    return jax.lax.scan(step, x, (*here, _lengths(nodes.tau)))[0]


def heun(denoise: Denoise, path: Path, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Second-order integration of dx/dtau = v over the path's nodes: two evaluations a step, and one in the
    last where the model is not asked at the data (as in Karras et al. 2022, arXiv:2206.00364, alg. 1)."""
    nodes = path.nodes(steps)
    twice = len(nodes.time) - 1  # steps with a model at both of their ends
    lengths = _lengths(nodes.tau)

    def step(x_t: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        (time, point), (next_time, next_point), length = inputs
        first = _velocity(denoise, x_t, time, point)
        second = _velocity(denoise, x_t + length * first, next_time, next_point)
        return x_t + length * 0.5 * (first + second), None

    here = _some(nodes.time, nodes.point, slice(0, twice))
    there = _some(nodes.time, nodes.point, slice(1, twice + 1))
    x, _ = jax.lax.scan(step, x, (here, there, lengths[:twice]))
    if twice < steps:
        time, point = _some(nodes.time, nodes.point, slice(twice, twice + 1))
        last = jax.tree.map(lambda table: table[0], point)
        x = x + lengths[-1] * _velocity(denoise, x, time[0], last)
    return x


def _velocity(denoise: Denoise, x_t: jax.Array, time: jax.Array, point: Point) -> jax.Array:
    found = denoise(x_t, time, point)
    return point.dalpha * found.x + point.dsigma * found.eps


def _lengths(tau: np.ndarray) -> jax.Array:
    return jnp.asarray(np.diff(tau).astype(np.float32))


def _some(time: np.ndarray, point: Point, part: slice) -> tuple[jax.Array, Point]:
    return jnp.asarray(time[part]), jax.tree.map(lambda table: table[part], point)


INTEGRATORS: dict[str, Callable[..., jax.Array]] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}
