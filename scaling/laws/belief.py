"""Beliefs about values that were not measured: rival forms, weighted by their evidence."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.forms import FORMS, LOG_ZERO, Form, Range
from scaling.laws.noise import wildness
from scaling.laws.posterior import PARTICLES, Posterior, fit
from scaling.laws.values import Values

Array = NDArray[np.float64]

RIVALS = {"power": ("broken", "saturating")}  # forms that compete with others
INTERVAL = 0.9  # probability of every interval that is shown
FORM_WEIGHT = 0.5  # of the form in question beforehand; its rivals share the rest
REFUTED = 0.05  # weight below which the values refute a form
HELD_OUT = 0.2  # fraction of the configurations, the largest, that a second fit leaves out and predicts


@dataclass(frozen=True)
class Belief:
    """The posteriors of a form and its rivals, and their weights [F]."""

    values: Values
    posteriors: tuple[Posterior, ...]
    weights: Array
    seed: int

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

    def runs(self, x: Array, seeds: int = 1) -> Array:
        """Returns draws of the mean y [P, N] of new runs at x [N, K]: of a configuration with so many seeds.

        Where configurations have one run each, nothing is known of seeds, whose mean then counts as one run.
        """
        rng = np.random.default_rng(self.seed)
        draws = []
        for posterior, rows in self._chosen:
            variance = np.zeros(len(rows))
            for name, spread in posterior.spread.items():
                variance += spread[rows] ** 2 / (1 if name == "configurations" else seeds)
            noise = rng.normal(size=(len(rows), len(x)))
            draws.append(posterior.curve(x)[rows] + np.sqrt(variance)[:, None] * noise)
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
    seed: int = 0,
    particles: int = PARTICLES,
) -> Belief:
    """Fits a form and its rivals to values.

    Args:
        values: what was measured.
        form: the name of the form in question.
        chance: the y of a model that has learnt nothing, where it is known.
        seed: of the draws.
        particles: the number of draws.

    Raises:
        UserError: if there is no such form, or the values are too few for it or of other quantities.
    """
    asked = _require(values, form)
    if chance is not None and chance <= values.y.max():
        chance = None  # values above chance: it is no ceiling
    span, levels, count = Range.of(values.x, values.y, chance), values.levels, _configurations(values)
    rivals = [FORMS[name] for name in RIVALS.get(form, ()) if FORMS[name].fewest <= count]
    posteriors = tuple(
        fit(each, values.x, values.y, levels, span, seed, particles) for each in (asked, *rivals)
    )
    priors = [FORM_WEIGHT, *((1 - FORM_WEIGHT) / len(rivals) for _ in rivals)]
    logs = np.log(priors) + [p.log_evidence for p in posteriors]
    weights = np.exp(logs - logs.max())
    return Belief(values, posteriors, weights / weights.sum(), seed)


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


def held_out(belief: Belief) -> tuple[Belief, NDArray[np.bool_]] | None:
    """Fits again without the configurations whose product of quantities is largest.

    Returns:
        The other fit, and which values it left out; None if too few remain.
    """
    values = belief.values
    size = np.log(values.x).sum(1)
    sizes = np.unique(size)
    count = max(1, round(HELD_OUT * len(sizes)))
    left = size > sizes[-count - 1] if len(sizes) > count else np.ones(len(size), bool)
    try:
        return believe(values.select(~left), belief.form.name, _chance(belief), belief.seed), left
    except UserError:
        return None


def _chance(belief: Belief) -> float | None:
    ceiling = belief.posteriors[0].span.ceiling
    return None if ceiling is None else float(np.exp(ceiling))


def interval(draws: Array, probability: float) -> tuple[Array, Array]:
    """Returns the ends of the central interval of draws [P, ...]."""
    tail = (1 - probability) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


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
        "left_out": list(belief.values.left_out),
    }
