"""Beliefs about values that were not measured: rival forms, weighted by their evidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from scaling.errors import UserError
from scaling.laws.forms import FORMS, LOG_ZERO, NO_LAW, Form, Range
from scaling.laws.noise import wildness
from scaling.laws.posterior import PARTICLES, Posterior, fit
from scaling.laws.values import Values

Array = NDArray[np.float64]

# Weights beforehand of forms that compete with others, of which each has that of 0.5.
RIVALS = {"power": {"broken": 0.2, "saturating": 0.2, "constant": 0.1}}
INTERVAL = 0.9  # probability of every interval that is shown
REFUTED = 0.05  # weight below which the values refute a form


@dataclass(frozen=True)
class Belief:
    """The posteriors of a form and its rivals, and their weights [F].

    `notes` say what else was known and could not be used, a line each.
    """

    values: Values
    posteriors: tuple[Posterior, ...]
    weights: Array
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def log_evidence(self) -> float:
        """The log of the evidence for the form and its rivals together."""
        return float(np.logaddexp.reduce(_logs(self.posteriors)))

    @property
    def form(self) -> Form:
        """The form in question."""
        return self.posteriors[0].form

    @property
    def lack_of_fit(self) -> dict[str, float]:
        """The weight of each form, by name."""
        return {p.form.name: float(w) for p, w in zip(self.posteriors, self.weights, strict=True)}

    @property
    def parameters(self) -> dict[str, Array]:
        """The draws [P] of the form's parameters, by the names in its formula."""
        return {
            name.removeprefix("log_"): _exp(draws) if name.startswith("log_") else draws
            for name, draws in self.posteriors[0].parameters.items()
        }

    def curve(self, x: Array) -> Array:
        """Returns draws of y [P, N] without noise at x [N, K], of all forms by their weights."""
        return np.exp(np.concatenate([p.curve(x)[rows] for p, rows in self._chosen]))

    def runs(self, x: Array, seeds: int | Array = 1) -> Array:
        """Returns draws of the mean y [P, N] of new configurations at x [N, K], of so many seeds each.

        Where configurations have one run each, nothing is known of seeds, whose mean then counts as one run.
        """
        rng = np.random.default_rng(self.seed)
        draws = []
        for posterior, rows in self._chosen:
            variance = np.zeros((len(rows), 1))
            for name, spread in posterior.spread.items():
                variance = variance + spread[rows, None] ** 2 / (1 if name == "configurations" else seeds)
            noise = rng.normal(size=(len(rows), len(x)))
            draws.append(posterior.curve(x)[rows] + np.sqrt(variance) * noise)
        return np.exp(np.concatenate(draws))

    @cached_property
    def _chosen(self) -> list[tuple[Posterior, NDArray[np.int64]]]:
        """Each form with the indices of some of its draws, as many as its weight says."""
        rng = np.random.default_rng(self.seed)
        count = len(next(iter(self.posteriors[0].spread.values())))
        numbers = np.diff(np.round(count * np.concatenate([[0.0], np.cumsum(self.weights)])).astype(int))
        return [(p, rng.permutation(count)[:n]) for p, n in zip(self.posteriors, numbers, strict=True)]

    @cached_property
    def wild(self) -> list[str]:
        """The configurations that are more likely wild than not under the likeliest form."""
        best, values = self.posteriors[int(self.weights.argmax())], self.values
        likely = wildness(np.log(values.y) - best.curve(values.x), best.spread, values.levels)
        return [str(name) for name, p in zip(np.unique(values.points), likely, strict=True) if p > 0.5]


def believe(
    values: Values,
    form: str = "power",
    chance: float | None = None,
    floor: float | None = None,
    seed: int = 0,
    particles: int = PARTICLES,
) -> Belief:
    """Fits a form and its rivals to values.

    Args:
        values: what was measured.
        form: the name of the form in question.
        chance: the y of a model that has learnt nothing, where it is known.
        floor: the smallest y that there can be, where it is known.
        seed: of the draws.
        particles: the number of draws.

    Raises:
        UserError: if there is no such form, or the values are too few for it or of other quantities.
    """
    asked = _require(values, form)
    notes = []
    if chance is not None and chance <= values.y.max():
        notes.append(f"chance is {chance:.4g}, and {values.y.max():.4g} was measured: it is no upper end")
        chance = None
    if floor is not None and floor >= values.y.min():
        notes.append(f"the floor is {floor:.4g}, and {values.y.min():.4g} was measured: it is no lower end")
        floor = None
    span, levels, count = Range.of(values.x, values.y, chance, floor), values.levels, _configurations(values)
    known = {**FORMS, NO_LAW.name: NO_LAW}
    rivals = [known[name] for name in RIVALS.get(form, {}) if known[name].fewest <= count]
    posteriors = tuple(
        fit(each, values.x, values.y, levels, span, seed, particles) for each in (asked, *rivals)
    )
    logs = _logs(posteriors)
    weights = np.exp(logs - logs.max())
    return Belief(values, posteriors, weights / weights.sum(), seed, tuple(notes))


def _logs(posteriors: Sequence[Posterior]) -> Array:
    """Returns the logs of the evidence for each form, the first in question, times its weight beforehand."""
    first, *rivals = posteriors
    weights = np.array([0.5, *(RIVALS[first.form.name][rival.form.name] for rival in rivals)])
    return np.log(weights / weights.sum()) + [p.log_evidence for p in posteriors]


def _exp(draws: Array) -> Array:
    """Returns the exponentials of logarithms, 0 for those that stand for log 0."""
    return np.where(draws > LOG_ZERO, np.exp(draws), 0.0)


def _configurations(values: Values) -> int:
    return len(np.unique(values.x, axis=0))


def _require(values: Values, name: str) -> Form:
    if name not in FORMS:
        raise UserError(f"form={name!r}: is none; there are {', '.join(FORMS)}")
    form, columns, count = FORMS[name], values.x.shape[1], _configurations(values)
    if form.columns != columns:
        fitting = ", ".join(each.name for each in FORMS.values() if each.columns == columns) or "none"
        given = ", ".join(values.names)
        raise UserError(f"form={name!r}: takes {form.columns} quantities, not {given}; for these: {fitting}")
    if count < form.fewest:
        less = [each.name for each in FORMS.values() if each.columns == columns and each.fewest <= count]
        advice = f"{less[0]} takes {count}" if less else "train more"
        raise UserError(
            f"form={name!r}: {count} different configurations, and it needs {form.fewest}; {advice}"
        )
    return form


def interval(draws: Array, probability: float) -> tuple[Array, Array]:
    """Returns the ends of the central interval of draws [P, ...]."""
    tail = (1 - probability) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def summary(draws: Array) -> dict[str, float]:
    """Returns the median of draws [P] and the ends of their interval."""
    low, high = interval(draws, INTERVAL)
    return {"value": float(np.median(draws)), "low": float(low), "high": float(high)}


def correlations(x: Array, y: Array) -> dict[str, float | None]:
    """Returns the correlations of log x [N, K], summed over K, and log y [N]: of ranks, and Pearson's."""
    u, v = np.log(x).sum(1), np.log(y)
    if len(np.unique(u)) < 3 or len(np.unique(v)) < 2:
        return {"spearman": None, "pearson": None}
    return {"spearman": float(spearmanr(u, v).statistic), "pearson": float(pearsonr(u, v).statistic)}


def as_json(belief: Belief) -> dict[str, object]:
    """Returns a law as `laws.json` and `scaling law --json` hold it."""
    parameters = belief.parameters
    return {
        "form": belief.form.name,
        "formula": belief.form.formula,
        "x": list(belief.values.names),
        "values": len(belief.values.y),
        "parameters": {name: float(np.median(draws)) for name, draws in parameters.items()},
        "intervals": {name: [float(end) for end in interval(d, INTERVAL)] for name, d in parameters.items()},
        "interval": INTERVAL,
        "spreads": {name: float(np.median(s)) for name, s in belief.posteriors[0].spread.items()},
        "lack_of_fit": belief.lack_of_fit,
        "refuted": bool(belief.weights[0] < REFUTED),
        "wild": belief.wild,
        "notes": list(belief.notes),
        "left_out": list(belief.values.left_out),
    }
