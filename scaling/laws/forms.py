"""Laws as data: each form is a formula of positive quantities x, its parameters, and what is likely before
anything was measured.

A form's parameters come from coordinates z [P, d] that are standard normal beforehand, so that one sampler
(`posterior`) fits every form. Exponents are log-normal around 0.4, from 0.09 to 1.8 in nine of ten: published
ones lie between 0.05 (language models in compute) and 1. Irreducible terms and the parts of a sum are given
as shares of y where x is largest, any of which is equally likely.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]
Parameters = dict[str, Array]  # each [P]

ALPHA, ALPHA_SPREAD = 0.4, 0.9  # median of exponents, and the standard deviation of their logarithm
LOG_ZERO = -600.0  # logarithms below stand for that of 0
NO_FLOOR = 0.25  # probability that there is no irreducible term
CHANGE, WIDTH = 0.3, 0.3  # spread of a break's change of exponent, and the break's width in log x


@dataclass(frozen=True)
class Range:
    """The data's extent, by which a form's parameters are of order one.

    Attributes:
        largest: log of the largest x [K].
        smallest: log of the smallest x [K].
        level: mean of log y.
        spread: standard deviation of log y, at least 1.
        ceiling: log of the y of a model that has learnt nothing, or None if there is no such value.
        floor: log of the smallest y that there can be, or None if that is not known.
    """

    largest: Array
    smallest: Array
    level: float
    spread: float
    ceiling: float | None = None
    floor: float | None = None

    @classmethod
    def of(cls, x: Array, y: Array, ceiling: float | None = None, floor: float | None = None) -> "Range":
        """Returns the extent of values y [N] at x [N, K]."""
        u, v = np.log(x), np.log(y)
        top, bottom = (None if each is None else float(np.log(each)) for each in (ceiling, floor))
        return cls(u.max(0), u.min(0), float(v.mean()), max(1.0, float(v.std())), top, bottom)


@dataclass(frozen=True)
class Form:
    """One form of a law.

    Attributes:
        name: how `--form` and `laws.json` call it.
        formula: the formula, in words.
        columns: the number K of quantities that it takes.
        dims: the number d of coordinates.
        fewest: the minimum number of different configurations to fit it to.
        parameters: maps (z [P, d], range) to the formula's parameters.
        curve: maps (parameters, log x [N, K], range) to log y [P, N].
    """

    name: str
    formula: str
    columns: int
    dims: int
    fewest: int
    parameters: Callable[[Array, Range], Parameters]
    curve: Callable[[Parameters, Array, Range], Array]


def _exponent(z: Array) -> Array:
    return ALPHA * np.exp(ALPHA_SPREAD * z)


def _level(z: Array, span: Range) -> Array:
    """Returns log y [P] where x is largest."""
    return span.level + span.spread * z


def _floor(z: Array) -> Array:
    """Returns the irreducible term's share [P] of y, or of y above the known floor.

    It is 0 with probability `NO_FLOOR`, else any.
    """
    return np.maximum(1 - (1 - ndtr(z)) / (1 - NO_FLOOR), 0)


def _above(level: Array, span: Range) -> Array:
    """Returns the log of what y [P] has above the known floor."""
    return level if span.floor is None else level + _log(-np.expm1(np.minimum(span.floor - level, -1e-6)))


def _irreducible(above: Array, share: Array, span: Range) -> Array:
    """Returns log E: of a share of what lies above the known floor, and the floor."""
    term = above + _log(share)
    return term if span.floor is None else np.logaddexp(term, span.floor)


def _log(share: Array) -> Array:
    return np.log(np.maximum(share, 1e-300))


# --- one quantity ---


def _constant(z: Array, span: Range) -> Parameters:
    return {"log_E": _level(z[:, 0], span)}


def _constant_curve(p: Parameters, u: Array, span: Range) -> Array:
    return np.repeat(p["log_E"][:, None], len(u), 1)


def _power_curve(p: Parameters, u: Array, span: Range) -> Array:
    return p["log_A"][:, None] - p["alpha"][:, None] * u[:, 0]


def _power_floor(z: Array, span: Range) -> Parameters:
    alpha, share, level = _exponent(z[:, 1]), _floor(z[:, 2]), _level(z[:, 0], span)
    above = _above(level, span)
    log_A = above + _log(1 - share) + alpha * span.largest[0]
    return {"log_E": _irreducible(above, share, span), "log_A": log_A, "alpha": alpha}


def _power_floor_curve(p: Parameters, u: Array, span: Range) -> Array:
    return np.logaddexp(p["log_E"][:, None], _power_curve(p, u, span))


def _saturating(z: Array, span: Range) -> Parameters:
    """Returns y = (E + C q) / (1 + q), q = A x^-alpha, which is (y - E) / (C - y) = q.

    Alabdulmohsin et al. 2022 (M4), without the exponent that they give to C - y.
    """
    alpha, share, level = _exponent(z[:, 1]), _floor(z[:, 2]), _level(z[:, 0], span)
    if span.ceiling is None:
        log_C = np.maximum(level, span.level) + np.exp(z[:, 3])  # a ceiling above every value
    else:
        log_C = np.full_like(level, span.ceiling)
        level = np.minimum(level, log_C - 1e-6)
    # Where x is largest, q = (y - E) / (C - y), with y = exp(level).
    above = _above(level, span)
    q = above + _log(1 - share) - log_C - _log(-np.expm1(np.minimum(level - log_C, -1e-12)))
    return {
        "log_E": _irreducible(above, share, span),
        "log_C": log_C,
        "log_A": q + alpha * span.largest[0],
        "alpha": alpha,
    }


def _saturating_curve(p: Parameters, u: Array, span: Range) -> Array:
    q = _power_curve(p, u, span)
    return np.logaddexp(p["log_E"][:, None], p["log_C"][:, None] + q) - np.logaddexp(0.0, q)


def _broken(z: Array, span: Range) -> Parameters:
    """Returns a law whose exponent changes, from `alpha` to `alpha_after` at a place within the range."""
    p = _power_floor(z[:, :3], span)
    place = span.smallest[0] + ndtr(z[:, 3]) * (span.largest[0] - span.smallest[0])
    change = CHANGE * z[:, 4]
    # A and E are those that give the level and the share at the largest x, where the break has its effect.
    bend = change * WIDTH * np.logaddexp(0.0, (span.largest[0] - place) / WIDTH)
    return {**p, "log_A": p["log_A"] + bend, "alpha_after": p["alpha"] + change, "log_break": place}


def _broken_curve(p: Parameters, u: Array, span: Range) -> Array:
    beyond = WIDTH * np.logaddexp(0.0, (u[:, 0] - p["log_break"][:, None]) / WIDTH)
    power = _power_curve(p, u, span) - (p["alpha_after"] - p["alpha"])[:, None] * beyond
    return np.logaddexp(p["log_E"][:, None], power)


# --- size and data ---


def _joint(z: Array, span: Range) -> Parameters:
    """Returns a law of any shares of E, A N^-alpha and B D^-beta in y where N and D are largest."""
    level = _level(z[:, 0], span)
    alpha, beta = _exponent(z[:, 1]), _exponent(z[:, 2])
    floor = 1 - np.sqrt(1 - _floor(z[:, 3]))
    size, above = ndtr(z[:, 4]) * (1 - floor), _above(level, span)
    return {
        "log_E": _irreducible(above, floor, span),
        "log_A": above + _log(size) + alpha * span.largest[0],
        "log_B": above + _log(1 - floor - size) + beta * span.largest[1],
        "alpha": alpha,
        "beta": beta,
    }


def _joint_curve(p: Parameters, u: Array, span: Range) -> Array:
    size, data = _power_curve(p, u, span), p["log_B"][:, None] - p["beta"][:, None] * u[:, 1]
    return np.logaddexp(p["log_E"][:, None], np.logaddexp(size, data))


def _repeated(z: Array, span: Range) -> Parameters:
    return {**_joint(z[:, :5], span), "repeats": 15.0 * np.exp(z[:, 5])}


def _repeated_curve(p: Parameters, u: Array, span: Range) -> Array:
    """Returns log y where data that are seen again are worth less (Muennighoff et al. 2023)."""
    again = np.maximum(np.exp(u[:, 1] - u[:, 2]) - 1, 0)  # D / U - 1
    repeats = p["repeats"][:, None]
    worth = np.minimum(u[:, 1], u[:, 2]) + np.log1p(repeats * -np.expm1(-again / repeats))  # log D' [P, N]
    data = p["log_B"][:, None] - p["beta"][:, None] * worth
    return np.logaddexp(p["log_E"][:, None], np.logaddexp(_power_curve(p, u, span), data))


# --- tokens and compute per token ---


def _surface(z: Array, span: Range) -> Parameters:
    return {
        "level": _level(z[:, 0], span),
        "alpha": _exponent(z[:, 1]),
        "beta": _exponent(z[:, 2]),
        "gamma": 0.1 * z[:, 3],
    }


def _surface_curve(p: Parameters, u: Array, span: Range) -> Array:
    """Returns log y, which falls along both logarithms, and along their product: a twisted plane."""
    first, second = (u - (span.largest + span.smallest) / 2).T
    bilinear = (
        p["alpha"][:, None] * first + p["beta"][:, None] * second - p["gamma"][:, None] * first * second
    )
    return p["level"][:, None] - bilinear


NO_LAW = Form("constant", "y = E", 1, 1, 2, _constant, _constant_curve)  # a rival, which nobody asks for
FORMS = {
    form.name: form
    for form in (
        Form("power", "y = E + A x^-alpha", 1, 3, 4, _power_floor, _power_floor_curve),
        Form("saturating", "(y - E) / (C - y) = A x^-alpha", 1, 4, 5, _saturating, _saturating_curve),
        Form(
            "broken",
            "y = E + A x^-alpha, of another exponent beyond a break",
            1,
            5,
            6,
            _broken,
            _broken_curve,
        ),
        Form("joint", "y = E + A N^-alpha + B D^-beta", 2, 5, 6, _joint, _joint_curve),
        Form(
            "repeated",
            "y = E + A N^-alpha + B D'^-beta, D' = U + U R (1 - exp(-(D / U - 1) / R))",
            3,
            6,
            7,
            _repeated,
            _repeated_curve,
        ),
        Form(
            "surface",
            "log y = c - alpha log x1 - beta log x2 + gamma log x1 log x2",
            2,
            4,
            5,
            _surface,
            _surface_curve,
        ),
    )
}
