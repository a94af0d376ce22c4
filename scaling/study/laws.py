"""The laws of a study: in gmacs at the end, in tokens and gmacs per token, in gmacs and examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.belief import INTERVAL, REFUTED, Belief, as_json, believe, correlations, interval, summary
from scaling.laws.forms import NO_LAW
from scaling.laws.held_out import SURPRISE, HeldOut, held_out
from scaling.laws.optimal import optimal
from scaling.study.evidence import Evidence, at_the_end, evidence
from scaling.study.results import StudyFolder

Array = NDArray[np.float64]

PERCENT = f"{INTERVAL:.0%}"
BEYOND = 4.0  # how far curves are drawn, in units of the largest x
PER_RUN = 8  # values of one run in the law of examples
CURVE_POINTS = 60  # number of x at which laws.json has a curve

# Each law of a study: its quantities and its form. Size and examples need runs of several durations.
LAWS = {
    "gmacs": (("gmacs",), "power"),
    "tokens": (("tokens", "gmacs_per_token"), "surface"),
    "examples": (("gmacs", "examples"), "joint"),
}


@dataclass(frozen=True)
class Law:
    """One law of a study, or the reason why there is none.

    Attributes:
        name: which, of `LAWS`.
        group: the family, or "" where there is only one.
        evidence: the values, and what was left out.
        table: the rows that it is fitted to.
    """

    name: str
    group: str
    evidence: Evidence
    table: pd.DataFrame

    @cached_property
    def _fitted(self) -> Belief | str:
        quantities, form = LAWS[self.name]
        metric = self.evidence.metric
        if self.table.empty:
            return "no value counts"
        floors = [value for value in (metric.y_floor, self.evidence.measured_floor) if value is not None]
        try:
            # A size that is off is so at every duration: its values are of one configuration.
            point = "size" if "examples" in quantities else "point"
            values = self.evidence.values(self.table, quantities, point)
            return believe(values, form, metric.y_chance, max(floors, default=None))
        except UserError as e:
            return str(e)

    @property
    def belief(self) -> Belief | None:
        """The fit, if there is one."""
        return self._fitted if isinstance(self._fitted, Belief) else None

    @property
    def reason(self) -> str | None:
        """Why there is no fit, if there is none."""
        return self._fitted if isinstance(self._fitted, str) else None

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The predictions of the largest configurations from the others, where enough remain."""
        return held_out(self.belief) if self.belief else None

    @property
    def refutation(self) -> str | None:
        """The reason why the law does not hold, or None."""
        belief = self.belief
        if belief is None:
            return None
        if belief.weights[0] < REFUTED:
            rival = max(belief.lack_of_fit, key=lambda name: belief.lack_of_fit[name])
            return f"the values fit the form {rival} better (weight {belief.lack_of_fit[rival]:.2f})"
        if self.held_out is not None and self.held_out.probability < SURPRISE:
            points = " and ".join(self.held_out.points)
            probability = f"{self.held_out.probability:.2g}"
            return f"fitted without the largest, it misses {points} (probability {probability})"
        return None

    def as_json(self) -> dict[str, Any]:
        """Returns the law as `laws.json` holds it."""
        described: dict[str, Any] = {"law": self.name, "group": self.group, "x": list(LAWS[self.name][0])}
        if self.belief is None:
            return {**described, "reason": self.reason}
        tests = self.held_out.as_json() if self.held_out else None
        described |= {**as_json(self.belief), "refutation": self.refutation, "held_out": tests}
        described["residuals"] = _residuals(self.belief)
        if self.name == "gmacs":
            described |= {"curve": _curve(self.belief), "doubling": doubling(self.belief)}
        if self.name == "examples":
            described["optimal"] = self.frontier()
        return described

    @property
    def cost(self) -> float:
        """FLOPs of training per gmac and example."""
        return float((self.table["train_flops"] / (self.table["gmacs"] * self.table["examples"])).median())

    def frontier(self) -> dict[str, Any]:
        """Returns the best size, examples and y for each budget of training compute, in FLOPs.

        Budgets go from the smallest run's to four times the largest's.
        """
        assert self.belief is not None
        compute = self.table["train_flops"]
        budgets = np.geomspace(compute.min(), BEYOND * compute.max(), CURVE_POINTS)
        best = optimal(self.belief, budgets, self.cost)
        curves = {"gmacs": best.size, "examples": best.data, "y": best.y}
        return {
            "cost": self.cost,
            "exponents": {name: summary(draws) for name, draws in best.exponents.items()},
            "train_flops": budgets.tolist(),
            **{name: _band(draws) for name, draws in curves.items()},
        }


def laws_of(evidence: Evidence) -> list[Law]:
    """Returns the laws that the values may have, those of each family apart."""
    return [
        Law(name, group, evidence, rows)
        for group in evidence.groups
        for name, rows in _tables(evidence.table[evidence.table["group"] == group])
    ]


def _tables(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields each law's name and the rows that it is fitted to."""
    last = at_the_end(table)
    yield "gmacs", last
    if last["tokens"].nunique() > 1 and last["gmacs_per_token"].nunique() > 1:
        yield "tokens", last
    if table["examples"].nunique() > 1:
        yield "examples", _thinned(table)


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    """Returns at most `PER_RUN` values of each run, at steps of about one ratio, its last among them.

    Neighbours in a run say much the same, and a fit takes as long as there are values.
    """
    kept: list[int] = []
    for _, rows in table.groupby("run", sort=False):
        examples = rows["examples"].to_numpy(float)
        wanted = np.geomspace(examples.min(), examples.max(), PER_RUN)
        nearest = np.abs(np.log(examples[None] / wanted[:, None])).argmin(1)
        kept += rows.index[np.unique(nearest)].tolist()
    return table.loc[sorted(kept)]


def fit_laws(folder: StudyFolder) -> dict[str, Any]:
    """Fits the laws of a study, as `laws.json` has them.

    Returns:
        `metric` and `fitted`, the name of its y; `spearman` and `pearson`, correlations of log gmacs and
        log y at the end of training; `laws`, a list; and `left_out`, what was left out and why.
    """
    found = evidence(folder)
    return {
        "metric": folder.metric.as_json(),
        "fitted": folder.metric.label,
        "interval": INTERVAL,
        **correlation(found),
        "laws": [law.as_json() for law in laws_of(found)],
        "left_out": list(found.left_out),
    }


def correlation(found: Evidence) -> dict[str, float | None]:
    """Returns the correlations of log gmacs and log y at the end of training, over means of seeds."""
    last = at_the_end(found.table)
    means = last.groupby("point", sort=False)[["gmacs", "y"]].mean()
    return correlations(means[["gmacs"]].to_numpy(float), means["y"].to_numpy(float))


def doubling(belief: Belief) -> dict[str, float]:
    """Returns the share by which y falls when x doubles, on the whole range of the values."""
    x = belief.values.x
    ends = np.array([x.min(0), x.max(0)])
    first, last = belief.curve(ends).T
    return summary(1 - (last / first) ** (1 / np.log2(ends[1] / ends[0]).item()))


def _residuals(belief: Belief) -> list[dict[str, Any]]:
    """Returns what each value has beyond the law, as a share of it, by x."""
    values = belief.values
    law = np.median(belief.curve(values.x), 0)
    return [
        {
            "point": values.points[i], "run": values.runs[i], "x": values.x[i].tolist(),
            "y": float(values.y[i]), "law": float(law[i]), "residual": float(values.y[i] / law[i] - 1),
        }
        for i in np.argsort(np.log(values.x).sum(1), kind="stable")
    ]  # fmt: skip


def _curve(belief: Belief) -> dict[str, Any]:
    """Returns the curve, its interval, and that of a new run, to beyond the largest x."""
    x = np.geomspace(belief.values.x.min(), BEYOND * belief.values.x.max(), CURVE_POINTS)
    # One x at a time, so that a draw's run errs alike everywhere: its interval is then smooth in x.
    low, high = interval(np.concatenate([belief.runs(at[None, None]) for at in x], 1), INTERVAL)
    return {
        "x": x.tolist(),
        **_band(belief.curve(x[:, None])),
        "run_low": low.tolist(),
        "run_high": high.tolist(),
    }


def _band(draws: Array) -> dict[str, list[float]]:
    low, high = interval(draws, INTERVAL)
    return {"value": np.median(draws, 0).tolist(), "low": low.tolist(), "high": high.tolist()}


def law_in(laws: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Returns the laws of one name in a `laws.json`: one for each family."""
    return [law for law in laws["laws"] if law["law"] == name]


def describe(law: Mapping[str, Any]) -> str:
    """Describes a law in one line, such as `exponent 0.31 (90%: 0.25 to 0.4), E = 12 (10 to 13)`."""
    if "reason" in law:
        return f"no law: {law['reason']}"
    parts = []
    for name, value in law["parameters"].items():
        if name in ("alpha", "beta", "gamma", "E"):
            low, high = law["intervals"][name]
            span = f"{PERCENT}: {low:.2g} to {high:.2g}" if name == "alpha" else f"{low:.3g} to {high:.3g}"
            parts.append(f"{'exponent' if name == 'alpha' else f'{name} ='} {value:.3g} ({span})")
    text = ", ".join(sorted(parts, key=lambda part: part.startswith("E")))
    if law["refutation"]:
        return f"{text}; refuted: {law['refutation']}"
    weight = law["lack_of_fit"].get(NO_LAW.name, 0.0)
    return f"{text}; or no law at all, with probability {weight:.2f}" if weight >= REFUTED else text


def named(law: Mapping[str, Any]) -> str:
    """Returns a law's name in words, such as `gmacs` or `gmacs and examples, vit`."""
    words: Sequence[str] = [x.replace("_", " ") for x in law["x"]]
    return " and ".join(words) + (f", {law['group']}" if law["group"] else "")
