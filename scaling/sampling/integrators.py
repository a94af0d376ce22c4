"""Integrators from noise to data: each is one `lax.scan` over the steps.

An integrator takes `denoise(x_t [N, ..., C], time [], point) -> Denoised`, a path, a number of steps, the
first noise x [N, ..., C], and `noise(i []) -> [N, ..., C]`, the fresh noise of step i; it returns the
sample [N, ..., C].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.diffusion import Chain, Path, Point


class Denoised(NamedTuple):
    """A model's estimates from x_t: the data, the noise, and the raw variance if learned ([N, ..., C])."""

    x: jax.Array
    eps: jax.Array
    raw: jax.Array | None


Denoise = Callable[[jax.Array, jax.Array, Point], Denoised]
Noise = Callable[[jax.Array], jax.Array]


def ddpm(denoise: Denoise, path: Chain, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Samples ancestrally (Ho et al. 2020, alg. 2), with the learned variance if there is one.

    The chain is respaced to the steps (Nichol and Dhariwal 2021, sec. 4).
    """
    chain = path.respaced(steps)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        denoised = denoise(x_t, chain.time(i), chain.point(i))
        mean = chain.posterior_mean(i, denoised.x, x_t)
        sigma = jnp.exp(0.5 * chain.log_variance(i, denoised.raw))
        return mean + jnp.where(i > 0, sigma, 0.0) * noise(i), None  # the last step adds no noise

    return jax.lax.scan(step, x, jnp.arange(steps)[::-1])[0]


def ddim(denoise: Denoise, path: Chain, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Samples without noise (Song et al. 2021, arXiv:2010.02502, eq. 12, sigma 0) on the respaced chain."""
    chain = path.respaced(steps)

    def step(x_t: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        denoised = denoise(x_t, chain.time(i), chain.point(i))
        alpha, sigma = chain.before(i)
        return alpha * denoised.x + sigma * denoised.eps, None

    return jax.lax.scan(step, x, jnp.arange(steps)[::-1])[0]


def euler(denoise: Denoise, path: Path, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Integrates dx/dtau = v to first order over the path's nodes: one evaluation per step."""
    nodes = path.nodes(steps)
    starts = _table(nodes.time, nodes.point, slice(0, steps))

    def step(x_t: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        time, point, length = inputs
        return x_t + length * _velocity(denoise, x_t, time, point), None

    return jax.lax.scan(step, x, (*starts, _lengths(nodes.tau)))[0]


def heun(denoise: Denoise, path: Path, steps: int, x: jax.Array, noise: Noise) -> jax.Array:
    """Integrates dx/dtau = v to second order over the path's nodes: two evaluations per step.

    The last step has one if the model is not evaluated at the data (as in Karras et al. 2022,
    arXiv:2206.00364, alg. 1).
    """
    nodes = path.nodes(steps)
    full_steps = len(nodes.time) - 1  # number of steps with an evaluation at both ends
    lengths = _lengths(nodes.tau)

    def step(x_t: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        (time, point), (next_time, next_point), length = inputs
        first = _velocity(denoise, x_t, time, point)
        second = _velocity(denoise, x_t + length * first, next_time, next_point)
        return x_t + length * 0.5 * (first + second), None

    starts = _table(nodes.time, nodes.point, slice(0, full_steps))
    ends = _table(nodes.time, nodes.point, slice(1, full_steps + 1))
    x, _ = jax.lax.scan(step, x, (starts, ends, lengths[:full_steps]))
    if full_steps < steps:
        time, point = _table(nodes.time, nodes.point, slice(full_steps, full_steps + 1))
        last_point = jax.tree.map(lambda table: table[0], point)
        x = x + lengths[-1] * _velocity(denoise, x, time[0], last_point)
    return x


def _velocity(denoise: Denoise, x_t: jax.Array, time: jax.Array, point: Point) -> jax.Array:
    """Returns v = dx/dtau at x_t."""
    denoised = denoise(x_t, time, point)
    return point.dalpha * denoised.x + point.dsigma * denoised.eps


def _lengths(tau: np.ndarray) -> jax.Array:
    return jnp.asarray(np.diff(tau).astype(np.float32))


def _table(time: np.ndarray, point: Point, part: slice) -> tuple[jax.Array, Point]:
    """Returns the times and points of some nodes, as arrays to scan over."""
    return jnp.asarray(time[part]), jax.tree.map(lambda table: table[part], point)


INTEGRATORS: dict[str, Callable[..., jax.Array]] = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}
