"""Paths from noise to data, what a model predicts on them, and how errors are weighted.

Every path is x_t = alpha_t x + sigma_t eps, with x the data and eps ~ N(0, I). There is one velocity,
v = dalpha x + dsigma eps, the derivative along the path. Schedules are computed in NumPy float64 and become
float32 tables at the end: in JAX, products of a thousand float32 factors would lose the small differences.

`where` is a position on a path: an index [...] int32 into a `Chain`, a time [...] float32 on `Straight`.
Shape it [B, 1, ..., 1] (or [] for a whole batch) to broadcast the coefficients over x [B, ..., C].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError


class Point(NamedTuple):
    """Coefficients at one or many positions: x_t = alpha x + sigma eps, v = dalpha x + dsigma eps."""

    alpha: jax.Array
    sigma: jax.Array
    dalpha: jax.Array
    dsigma: jax.Array


class Nodes(NamedTuple):
    """The grid on which a flow is integrated, from noise to data.

    `tau` [n + 1] float64 is the variable with v = dx/dtau; `time` [m] and `point`, of [m] each, are float32
    and belong to the first m nodes: m is n if the last node is the data itself, where no model is defined.
    """

    tau: np.ndarray
    time: np.ndarray
    point: Point


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _float32_point(*coefficients: np.ndarray) -> Point:
    return Point(*(jnp.asarray(_float32(values)) for values in coefficients))


def _lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(table)[index]


class Chain:
    """A discrete variance-preserving path (Ho et al. 2020, arXiv:2006.11239), noisier as the index rises.

    alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t). The velocity is the derivative with respect to the
    angle, alpha = cos, sigma = sin: v = alpha eps - sigma x (Salimans and Ho 2022, arXiv:2202.00512, app. D).
    A model is given the *original* index as its time, 0 to 999, also in a respaced chain.
    """

    def __init__(self, alpha_bar: np.ndarray, times: np.ndarray) -> None:
        """Tabulates the coefficients of `alpha_bar` [T] float64, which falls.

        `times` [T] are the times that the model is given at each index.
        """
        self.alpha_bar, self.times = alpha_bar, times
        before = np.append(1.0, alpha_bar[:-1])  # alpha_bar one index closer to the data
        self.betas = 1.0 - alpha_bar / before
        variance = self.betas * (1.0 - before) / (1.0 - alpha_bar)  # eq. 7
        # The posterior at index 0 is a point; its logarithm is replaced by the next one, as in improved DDPM.
        log_posterior = np.log(np.append(variance[1:2], variance[1:]))
        self._time = _float32(times)
        self._alpha, self._sigma = _float32(np.sqrt(alpha_bar)), _float32(np.sqrt(1.0 - alpha_bar))
        self._alpha_before, self._sigma_before = _float32(np.sqrt(before)), _float32(np.sqrt(1.0 - before))
        self._mean_x = _float32(self.betas * np.sqrt(before) / (1.0 - alpha_bar))
        self._mean_x_t = _float32((1.0 - before) * np.sqrt(1.0 - self.betas) / (1.0 - alpha_bar))
        self._log_beta, self._log_posterior = _float32(np.log(self.betas)), _float32(log_posterior)

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def trimmed(self) -> "Chain":
        """Returns the chain itself: neither of its ends is singular."""
        return self

    def draw(self, rng: jax.Array, count: int) -> jax.Array:
        """Draws uniform indices [count] int32."""
        return jax.random.randint(rng, (count,), 0, len(self))

    def quantiles(self, count: int) -> jax.Array:
        """Returns the middles of `count` equal parts of what `draw` draws, [count] int32."""
        return jnp.asarray((np.arange(count) + 0.5) / count * len(self), jnp.int32)

    def time(self, where: jax.Array) -> jax.Array:
        """Returns the time that the model is given, float32 of the shape of `where`."""
        return _lookup(self._time, where)

    def point(self, where: jax.Array) -> Point:
        alpha, sigma = _lookup(self._alpha, where), _lookup(self._sigma, where)
        return Point(alpha, sigma, -sigma, alpha)

    def before(self, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns alpha and sigma one index closer to the data; (1, 0) for index 0."""
        return _lookup(self._alpha_before, where), _lookup(self._sigma_before, where)

    def posterior_mean(self, where: jax.Array, x: jax.Array, x_t: jax.Array) -> jax.Array:
        """Computes the mean of q(x_{t-1} | x_t, x), eq. 7: [B, ..., C]."""
        return _lookup(self._mean_x, where) * x + _lookup(self._mean_x_t, where) * x_t

    def posterior_log_variance(self, where: jax.Array) -> jax.Array:
        """Returns the log of eq. 7's variance, with index 0 replaced by index 1."""
        return _lookup(self._log_posterior, where)

    def log_variance(self, where: jax.Array, raw: jax.Array | None) -> jax.Array:
        """Returns the log variance of the reverse step: learned, from `raw` [B, ..., C], or fixed.

        Learned: frac log beta + (1 - frac) log beta~ with frac = (raw + 1) / 2 (Nichol and Dhariwal 2021,
        arXiv:2102.09672, eq. 15). Fixed: log beta, as in DiT and ADM.
        """
        if raw is None:
            return _lookup(self._log_beta, where)
        frac = (raw + 1.0) / 2.0
        return frac * _lookup(self._log_beta, where) + (1.0 - frac) * _lookup(self._log_posterior, where)

    def respaced(self, steps: int) -> "Chain":
        """Returns the chain of `steps` of its indices, evenly strided with both ends, as in ADM and DiT.

        Raises:
            UserError: if `steps` is not from 2 to len(self).
        """
        if not 2 <= steps <= len(self):
            raise UserError(f"steps={steps}: a {len(self)}-step path is sampled in 2 to {len(self)} steps")
        stride = (len(self) - 1) / (steps - 1)
        # Summed one by one and rounded half to even, so that ties fall as they do in ADM.
        indices = np.round(np.cumsum(np.append(0.0, np.full(steps - 1, stride)))).astype(np.int64)
        return Chain(self.alpha_bar[indices], self.times[indices])

    def nodes(self, steps: int) -> Nodes:
        """Returns the nodes of the probability flow, from the last index of the respaced chain to the data.

        The variable is the angle, tau = arctan(sigma / alpha).
        """
        chain = self.respaced(steps)
        alpha_bar = chain.alpha_bar[::-1]
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        tau = np.append(np.arctan2(sigma, alpha), 0.0)
        return Nodes(tau, chain._time[::-1], _float32_point(alpha, sigma, -sigma, alpha))


@dataclass(frozen=True)
class Straight:
    """The straight path x_t = t x + (1 - t) eps, v = x - eps: noise at t = 0 and *data at t = 1*.

    This is SiT's convention (Ma et al. 2024, arXiv:2401.08740); most other flow papers have the data at
    t = 0. The model is given t itself, in [0, 1].
    """

    low: float = 0.0
    high: float = 1.0

    def trimmed(self) -> "Straight":
        """Returns the path without its singular ends, where x does not follow from eps, nor eps from x."""
        return Straight(1e-3, 1.0 - 1e-3)

    def draw(self, rng: jax.Array, count: int) -> jax.Array:
        """Draws uniform times [count] float32."""
        return jax.random.uniform(rng, (count,), minval=self.low, maxval=self.high)

    def quantiles(self, count: int) -> jax.Array:
        """Returns the middles of `count` equal parts of what `draw` draws, [count] float32."""
        return jnp.asarray(self.low + (np.arange(count) + 0.5) / count * (self.high - self.low), jnp.float32)

    def time(self, where: jax.Array) -> jax.Array:
        """Returns the time that the model is given: t."""
        return where

    def point(self, where: jax.Array) -> Point:
        return Point(where, 1.0 - where, jnp.ones_like(where), -jnp.ones_like(where))

    def nodes(self, steps: int) -> Nodes:
        """Returns the nodes of `steps` equal steps in t up to the data, where a trimmed path asks no model.

        Raises:
            UserError: if `steps` is less than 1.
        """
        if steps < 1:
            raise UserError(f"steps={steps}: must be at least 1")
        tau = np.linspace(self.low, 1.0, steps + 1)
        t = tau if self.high == 1.0 else tau[:-1]
        ones = np.ones_like(t)
        return Nodes(tau, _float32(t), _float32_point(t, 1.0 - t, ones, -ones))


Path = Chain | Straight


def _chain_from_betas(betas: np.ndarray) -> Chain:
    return Chain(np.cumprod(1.0 - betas), np.arange(len(betas)))


def _cosine_betas(steps: int) -> np.ndarray:
    """Returns the betas of Nichol and Dhariwal 2021, eq. 17, clipped at 0.999."""
    t = np.arange(steps + 1, dtype=np.float64) / steps
    alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2.0) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


PATHS: dict[str, Path] = {
    "ddpm-linear": _chain_from_betas(np.linspace(1e-4, 0.02, 1000, dtype=np.float64)),  # DDPM, ADM and DiT
    "ddpm-cosine": _chain_from_betas(_cosine_betas(1000)),
    "straight": Straight(),
}
PREDICTIONS = ("eps", "x", "v")
WEIGHTINGS = ("uniform", "min-snr")


def noised(x: jax.Array, eps: jax.Array, point: Point) -> jax.Array:
    """Returns x_t = alpha x + sigma eps: [B, ..., C]."""
    return point.alpha * x + point.sigma * eps


def target(prediction: str, x: jax.Array, eps: jax.Array, point: Point) -> jax.Array:
    """Returns the target of a model that predicts "eps", "x" or "v": [B, ..., C]."""
    if prediction == "v":
        return point.dalpha * x + point.dsigma * eps
    return eps if prediction == "eps" else x


def estimates(
    prediction: str, output: jax.Array, x_t: jax.Array, point: Point
) -> tuple[jax.Array, jax.Array]:
    """Returns (x, eps), each [B, ..., C], that a model's output and x_t imply: the inverse of `target`.

    "eps" needs alpha > 0 and "x" needs sigma > 0; "v" has no singular point.
    """
    if prediction == "v":
        scale = point.alpha * point.dsigma - point.sigma * point.dalpha  # 1 for a Chain, -1 for Straight
        x = (point.dsigma * x_t - point.sigma * output) / scale
        return x, (point.alpha * output - point.dalpha * x_t) / scale
    if prediction == "eps":
        return (x_t - point.sigma * output) / point.alpha, output
    return output, (x_t - point.alpha * output) / point.sigma


def weight(weighting: str, prediction: str, point: Point, gamma: float = 5.0) -> jax.Array:
    """Returns the weight of the squared error of a prediction, of the shape of `point.alpha`.

    "uniform" is 1. "min-snr" is min(SNR, gamma) on the error of x, with SNR = (alpha / sigma)^2, expressed
    for the prediction (Hang et al. 2023, arXiv:2303.09556, sec. 3.4): an error d in x is one of
    d alpha / sigma in eps and of d / sigma in v, as |alpha dsigma - sigma dalpha| = 1 on every path here.
    """
    if weighting == "uniform":
        return jnp.ones_like(point.alpha)
    signal, noise = point.alpha**2, point.sigma**2
    if prediction == "v":
        return jnp.minimum(signal, gamma * noise)
    if prediction == "eps":
        return jnp.minimum(1.0, gamma * noise / signal)
    return jnp.minimum(signal / noise, gamma)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Computes the tanh approximation by which the DDPM family's decoder is defined."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x: jax.Array, mean: jax.Array, log_sigma: jax.Array) -> jax.Array:
    """Computes the log probability, in nats, of 8-bit data under a discretised Gaussian: [B, ..., C].

    Data are scaled to [-1, 1]. Bins are 2/255 wide; the outermost reach to infinity (Ho et al. 2020, eq. 13).
    """
    inverse = jnp.exp(-log_sigma)
    above = _normal_cdf(inverse * (x - mean + 1.0 / 255.0))
    below = _normal_cdf(inverse * (x - mean - 1.0 / 255.0))
    inside = jnp.where(x > 0.999, 1.0 - below, above - below)
    return jnp.log(jnp.maximum(jnp.where(x < -0.999, above, inside), 1e-12))


def vlb(
    chain: Chain, where: jax.Array, x: jax.Array, x_t: jax.Array, x_hat: jax.Array, raw: jax.Array
) -> jax.Array:
    """Computes the variational bound's term at `where` [B, 1, ..., 1], in bits per dimension: [B].

    The term is KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), and at index 0 the decoder's negative
    log-likelihood. Gradients reach the variance, through `raw` [B, ..., C], but not the mean, through
    `x_hat` (Nichol and Dhariwal 2021, sec. 3.1). The term is not summed over the chain or multiplied by its
    length.
    """
    true_mean, true_log = chain.posterior_mean(where, x, x_t), chain.posterior_log_variance(where)
    mean = chain.posterior_mean(where, jax.lax.stop_gradient(x_hat), x_t)
    log = chain.log_variance(where, raw)
    kl = 0.5 * (log - true_log + jnp.exp(true_log - log) + (true_mean - mean) ** 2 * jnp.exp(-log) - 1.0)
    nll = -decoder_log_likelihood(x, mean, 0.5 * log)
    return jnp.where(where == 0, nll, kl).mean(axis=tuple(range(1, x.ndim))) / math.log(2.0)
