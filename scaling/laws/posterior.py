"""The posterior of a law: draws of its parameters and its noise, given values.

Draws come from sequential Monte Carlo (Del Moral et al. 2006): particles from the prior are reweighted by a
growing power of the likelihood, resampled, and moved by Metropolis steps of their own covariance. It needs
no starting point and no gradient, finds separate modes, stays right where an irreducible term is near zero,
and gives the evidence by which forms compete.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.laws.forms import Form, Parameters, Range
from scaling.laws.noise import Levels, Spreads, log_likelihood, spreads

Array = NDArray[np.float64]

PARTICLES = 1000
KEPT = 0.5  # effective share of the particles that a step of the power keeps
SWEEPS = 25  # maximum number of sweeps after each step
MIXED = 0.2  # correlation of each coordinate with its value before a step's sweeps at which they end
FREEDOM = 5.0  # degrees of freedom of the Student's t of far moves


@dataclass(frozen=True)
class Posterior:
    """Draws [P] of a form's parameters and spreads, and the log of the evidence for the form."""

    form: Form
    span: Range
    parameters: Parameters
    spread: Spreads
    log_evidence: float

    def curve(self, x: Array) -> Array:
        """Returns log y [P, N] without noise at x [N, K]."""
        return self.form.curve(self.parameters, np.log(x), self.span)


def fit(
    form: Form, x: Array, y: Array, levels: Levels, span: Range, seed: int = 0, particles: int = PARTICLES
) -> Posterior:
    """Fits a form to values y [N] at x [N, K], all positive."""
    levels, u, v = levels.merged(np.log(x), np.log(y))

    def likelihood(z: Array) -> Array:
        curve = form.curve(form.parameters(z[:, : form.dims], span), u, span)
        return log_likelihood(v - curve, spreads(z[:, form.dims :], levels), levels)

    dims = form.dims + len(levels.spreads)
    z, log_evidence = sample(likelihood, dims, particles, np.random.default_rng(seed))
    parameters = form.parameters(z[:, : form.dims], span)
    return Posterior(form, span, parameters, spreads(z[:, form.dims :], levels), log_evidence)


def sample(
    log_likelihood: Callable[[Array], Array], dims: int, particles: int, rng: np.random.Generator
) -> tuple[Array, float]:
    """Draws coordinates z [P, dims], standard normal beforehand, given a likelihood.

    Returns:
        The draws, and the log of the evidence: the likelihood's mean under the prior.
    """
    z = rng.normal(size=(particles, dims))
    fit, power, log_evidence = log_likelihood(z), 0.0, 0.0
    while power < 1:
        step = _step(fit, 1 - power)
        logs = step * fit
        weights = np.exp(logs - logs.max())
        log_evidence += float(np.log(weights.mean()) + logs.max())
        power = 1.0 if step == 1 - power else power + step
        chosen = _resample(weights / weights.sum(), rng)
        z, fit = z[chosen], fit[chosen]
        z, fit = _move(z, fit, log_likelihood, power, rng)
    return z, log_evidence


def _step(fit: Array, most: float) -> float:
    """Returns the step of the power that keeps the wanted share of particles, by bisection."""

    def kept(step: float) -> float:
        weights = np.exp(step * (fit - fit.max()))
        return float(weights.sum() ** 2 / (weights**2).sum() / len(fit))

    if kept(most) >= KEPT:
        return most
    low, high = 0.0, most
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= KEPT else (low, middle)
    return high


def _resample(weights: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns the indices [P] of systematic resampling."""
    places = (rng.random() + np.arange(len(weights))) / len(weights)
    return np.minimum(np.searchsorted(np.cumsum(weights), places), len(weights) - 1)


def _move(
    z: Array,
    fit: Array,
    log_likelihood: Callable[[Array], Array],
    power: float,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Returns the particles, and their log-likelihoods, after sweeps that make them forget where they were.

    A sweep is two Metropolis steps. One is a random walk; the other draws anew from a Student's t of the
    particles' own mean and covariance, which goes any distance where the posterior is nearly normal.
    """
    count, dims = z.shape
    mean, root = z.mean(0), np.linalg.cholesky(np.cov(z, rowvar=False) + 1e-10 * np.eye(dims))

    def target(at: Array, fit: Array) -> Array:
        return power * fit - 0.5 * (at**2).sum(1)

    def proposal(at: Array) -> Array:
        whitened = np.linalg.solve(root, (at - mean).T)
        return -0.5 * (FREEDOM + dims) * np.log1p((whitened**2).sum(0) / FREEDOM)

    scale = 2.38 / dims**0.5
    before = z
    for step in range(2 * SWEEPS):
        steps, far = rng.normal(size=z.shape) @ root.T, step % 2
        if far:
            new = mean + steps / np.sqrt(rng.chisquare(FREEDOM, size=(count, 1)) / FREEDOM)
        else:
            new = z + scale * steps
        new_fit = log_likelihood(new)
        gain = target(new, new_fit) - target(z, fit)
        if far:
            gain += proposal(z) - proposal(new)
        accepted = np.log(rng.random(count)) < gain
        z, fit = np.where(accepted[:, None], new, z), np.where(accepted, new_fit, fit)
        if far and _correlation(before, z) < MIXED:
            break
        if not far:
            scale *= np.exp(accepted.mean() - 0.3)  # towards an acceptance of 0.3
    return z, fit


def _correlation(first: Array, second: Array) -> float:
    """Returns the largest correlation of a coordinate [P, d] with its other value."""
    a, b = (each - each.mean(0) for each in (first, second))
    return float(np.max((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))))
