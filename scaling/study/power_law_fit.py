"""The numbers behind the laws: many small robust fits of y = E + A x^-alpha at once, in NumPy.

Every fit is three parameters, theta = (a, alpha, e), of
    log y = log(exp(a - alpha u) + exp(e)),   u = log x - centre
(Hoffmann et al. 2022, section D.2, the log-sum-exp form), found by Levenberg-Marquardt on Huber weights.
Thousands of resamples take a second together, where one optimiser call each would take minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHA = (-3.0, 6.0)  # range in which exponents are searched
LEAST = -12.0  # log of the smallest E, relative to the smallest y: no different from none
NONE = -1e3  # log of an E of exactly zero
ITERATIONS = 100
HUBER = 1.345  # delta in units of the residuals' spread: 95 % efficient if they are normal
SMALLEST_SPREAD = 1e-4  # minimum spread of residuals (log units); below, points lie on the curve


@dataclass(frozen=True)
class Fits:
    """B fits: `theta` [B, 3] and `centre` as above, the `slope` [B] of fits without E, the loss's `delta`."""

    theta: Array
    centre: float
    slope: Array
    delta: float

    @property
    def alpha(self) -> Array:
        """The exponents [B]."""
        return self.theta[:, 1]

    @property
    def E(self) -> Array:
        """The irreducible terms [B]."""
        return np.exp(self.theta[:, 2])

    @property
    def A(self) -> Array:
        """The factors [B] of the power terms."""
        return np.exp(self.theta[:, 0] + self.theta[:, 1] * self.centre)


def predict(fits: Fits, x: Array) -> Array:
    """Returns y [B, N] of every fit at x [N]."""
    u = np.log(x)[None] - fits.centre
    return np.exp(_curve(fits.theta, u)[0])


def fit(samples: Sequence[tuple[Array, Array]], near: Fits | None = None) -> Fits:
    """Fits each sample (x [N_i], y [N_i], all positive).

    Args:
        samples: the data of each fit.
        near: the fit to all the data, when the samples are resamples of it: they use its centre and its loss,
            and it is one of the starts.
    """
    centre = near.centre if near else float(np.mean(np.log(samples[0][0])))
    u, v, w = _padded(samples, centre)
    delta = near.delta if near else _delta(u, v, w)
    theta = _best(u, v, w, delta, _starts(u, v, w, near))
    pure = np.stack([np.sum(w * v, 1) / w.sum(1), np.full(len(u), 0.3), np.full(len(u), NONE)], -1)
    slope = _best(u, v, w, delta, pure[None])[:, 1]
    return Fits(theta, centre, slope, delta)


def _padded(samples: Sequence[tuple[Array, Array]], centre: float) -> tuple[Array, Array, Array]:
    """Returns log x - centre, log y and weights, each [B, N]; shorter samples end in copies of weight 0."""
    longest = max(len(x) for x, _ in samples)
    u, v, w = np.zeros((3, len(samples), longest))
    for i, (x, y) in enumerate(samples):
        n = len(x)
        u[i], v[i] = np.log(x[0]) - centre, np.log(y[0])
        u[i, :n], v[i, :n], w[i, :n] = np.log(x) - centre, np.log(y), 1.0
    return u, v, w


def _delta(u: Array, v: Array, w: Array) -> float:
    """Returns where the loss turns linear.

    It follows the spread (median absolute deviation) of a first fit's residuals.
    """
    theta = _best(u, v, w, 0.05, _starts(u, v, w, None))
    spread = float(np.median(np.abs(v - _curve(theta, u)[0]))) / 0.6745
    freedom = u.shape[1] / max(1, u.shape[1] - 3)  # three parameters take up some of the spread
    return HUBER * max(SMALLEST_SPREAD, spread * freedom**0.5)


def _starts(u: Array, v: Array, w: Array, near: Fits | None) -> Array:
    """Returns starting thetas [S, B, 3]: exponents times the irreducible term's shares of the smallest y."""
    smallest = np.where(w > 0, v, np.inf).min(1)
    middle = np.exp(np.sum(w * v, 1) / w.sum(1))
    alphas, shares = ((0.1, 0.3, 0.7, 1.5), (0.02, 0.5, 0.9)) if near is None else ((0.15, 0.6), (0.02, 0.8))
    starts = []
    for alpha in alphas:
        for share in shares:
            e = smallest + np.log(share)
            rest = np.log(np.maximum(middle - np.exp(e), 0.05 * middle))
            starts.append(np.stack([rest, np.full_like(e, alpha), e], -1))
    if near is not None:
        starts.append(np.broadcast_to(near.theta[0], starts[0].shape))
    return np.stack(starts)


def _curve(theta: Array, u: Array) -> tuple[Array, Array]:
    """Returns log y [B, N] and its derivatives [B, N, 3]."""
    a, alpha, e = theta[:, 0, None], theta[:, 1, None], theta[:, 2, None]
    f = np.logaddexp(a - alpha * u, e)
    share = np.exp(a - alpha * u - f)  # the power term's part of y
    return f, np.stack([share, -u * share, 1 - share], -1)


def _best(u: Array, v: Array, w: Array, delta: float, starts: Array) -> Array:
    """Returns the best theta [B, 3] of those that all starts [S, B, 3] lead to."""
    count, batch = starts.shape[:2]
    u, v, w = (np.tile(a, (count, 1)) for a in (u, v, w))
    theta, loss = _descend(u, v, w, delta, starts.reshape(-1, 3).copy())
    lowest = loss.reshape(count, batch).argmin(0)
    return theta.reshape(count, batch, 3)[lowest, np.arange(batch)]


def _descend(u: Array, v: Array, w: Array, delta: float, theta: Array) -> tuple[Array, Array]:
    """Runs Levenberg-Marquardt from each theta [B, 3]; returns the last thetas and their losses [B]."""
    lowest = np.minimum(np.where(w > 0, v, np.inf).min(1) + LEAST, theta[:, 2])
    damping = np.full(len(theta), 1e-2)
    loss = _loss(v - _curve(theta, u)[0], w, delta)
    live = np.arange(len(theta))  # indices of the fits that still move
    for _ in range(ITERATIONS):
        f, jacobian = _curve(theta[live], u[live])
        residual = v[live] - f
        weight = w[live] * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = (jacobian * weight[..., None]).swapaxes(1, 2)
        hessian = weighted @ jacobian
        diagonal = np.einsum("bii->bi", hessian)
        hessian = hessian + np.eye(3) * (damping[live, None] * diagonal + 1e-9)[:, :, None]
        step = np.linalg.solve(hessian, weighted @ residual[..., None])[..., 0]
        new = theta[live] + np.clip(step, -2.0, 2.0)
        new[:, 1] = np.clip(new[:, 1], *ALPHA)
        new[:, 2] = np.maximum(new[:, 2], lowest[live])
        gain = loss[live] - _loss(v[live] - _curve(new, u[live])[0], w[live], delta)
        better = gain > 0
        theta[live[better]] = new[better]
        settled = np.where(better, gain < 1e-9 * loss[live], damping[live] > 1e4)
        loss[live] -= np.maximum(gain, 0)
        damping[live] = np.where(better, damping[live] / 4, damping[live] * 5)
        live = live[~settled]
        if not len(live):
            break
    return theta, loss


def _loss(residual: Array, w: Array, delta: float) -> Array:
    size = np.abs(residual)
    return np.sum(w * np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta)), 1)
