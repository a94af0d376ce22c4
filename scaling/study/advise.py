"""`scaling advise W`: the next runs that narrow a prediction most for their hours.

The posterior's draws give the covariance of the curve at the question and at each candidate. Taken as normal,
a run at a candidate narrows the question's interval by a known amount whatever it will measure; runs are
chosen one by one, the one with the largest gain per hour first, until the hours are spent.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.belief import Belief
from scaling.study.evidence import evidence
from scaling.study.laws import BEYOND, LAWS, Law, laws_of
from scaling.study.question import ask, choose, covers, study_folder
from scaling.study.results import StudyFolder
from scaling.study.sweep import Overrides, load, product, without_seed

Array = NDArray[np.float64]
Hours = Callable[[float], float]  # FLOPs of training -> hours of a run

SEED = "train.seed"
COMBINATIONS = 50  # combinations of the study's values that are counted, a second or two for each
LEAST = 0.002  # share by which a run has to narrow the interval to be worth mentioning


@dataclass(frozen=True)
class Candidate:
    """A configuration that could be run, or run again.

    Attributes:
        overrides: without the seed.
        seeds: the seeds that it was run with.
        x: its quantities [K] in the law.
        hours: how long a run takes.
    """

    overrides: Overrides
    seeds: tuple[int, ...]
    x: Array
    hours: float


def advise(
    workdir: Path,
    hours: float,
    overrides: Overrides | None = None,
    seeds: int = 1,
    candidates: Path | None = None,
) -> list[dict[str, Any]]:
    """Returns the next runs that narrow a prediction most, the best for its hours first.

    Args:
        workdir: the study folder.
        hours: what the runs may take, one after the other.
        overrides: the configuration in question (default: four times the largest's gmacs).
        seeds: number of runs whose mean is in question.
        candidates: a study file whose sweep has the configurations to choose from beside those of the study;
            without, other combinations of the study's values, if they are at most `COMBINATIONS`.

    Returns:
        A list of `overrides`, `hours` and `shrinkage`: the share by which the interval narrows, this run and
        those before it included.

    Raises:
        UserError: if no law covers the question, or no run tells its hours.
    """
    folder = study_folder(workdir)
    laws = laws_of(evidence(folder))
    question = ask(folder, [overrides])[0] if overrides else None
    law = choose(laws, question) if question else _default_law(laws)
    assert law.belief is not None
    at = question.x(law) if question else _larger(law)
    rate = _hours(folder)
    options = [*_again(folder, law, rate), *_new(folder, law, rate, candidates)]
    return _chosen(law.belief, at, options, hours, seeds)


def _default_law(laws: Sequence[Law]) -> Law:
    for law in laws:
        if law.belief is not None:
            return law
    raise UserError(f"no law: {laws[0].reason if laws else 'no value counts'}")


def _larger(law: Law) -> Array:
    """Returns quantities [1, K] of four times the largest configuration's gmacs, and else like it."""
    assert law.belief is not None
    largest = law.belief.values.x[np.log(law.belief.values.x).sum(1).argmax()]
    return (largest * [BEYOND if name.startswith("gmacs") else 1.0 for name in LAWS[law.name][0]])[None]


def _hours(folder: StudyFolder) -> Hours:
    """Returns the hours of a run as a power of its FLOPs of training, fitted to the runs that are done.

    Raises:
        UserError: if no run tells its hours.
    """
    table = folder.table[folder.table["run"].isin(folder.done())].groupby("run").last()
    hours_of = pd.to_numeric(table["hours"]) if "hours" in table else pd.Series(0.0, index=table.index)
    known = table.assign(hours=hours_of)[hours_of > 0]
    if known.empty:
        raise UserError(
            f"{folder.path}: no run tells how long it took; advise needs the folders of done runs"
        )
    flops, hours = (np.log(known[name].to_numpy(float)) for name in ("train_flops", "hours"))
    power = np.polyfit(flops, hours, 1)[0] if np.ptp(flops) > np.log(2) else 1.0
    return lambda cost: float(np.exp(hours.mean() + power * (np.log(cost) - flops.mean())))


def _again(folder: StudyFolder, law: Law, rate: Hours) -> list[Candidate]:
    """Returns the configurations of the law, to run with another seed."""
    runs = {run.name: run for run in folder.runs}
    found = []
    for _, rows in law.table.groupby("point", sort=False):
        of_point = [runs[name] for name in dict.fromkeys(rows["run"])]
        overrides = without_seed(of_point[0].overrides)
        seeds = tuple(int(run.overrides.get(SEED, 0)) for run in of_point)
        last = rows.sort_values("step").iloc[-1]
        x = np.array([float(last[name]) for name in LAWS[law.name][0]])
        found.append(Candidate(overrides, seeds, x, rate(float(last["train_flops"]))))
    return found


def _new(folder: StudyFolder, law: Law, rate: Hours, candidates: Path | None) -> list[Candidate]:
    """Returns configurations that the study does not have, counted."""
    ran = [without_seed(run.overrides) for run in folder.runs]
    if candidates is not None:
        sweep = load(candidates).sweep
    else:
        axes: dict[str, list[Any]] = {}
        for key, value in (item for overrides in ran for item in overrides.items()):
            if value not in axes.setdefault(key, []):
                axes[key].append(value)
        sweep = product(axes)
    new: list[Overrides] = []
    for bare in map(without_seed, sweep):
        if bare not in ran and bare not in new:
            new.append(bare)
    if candidates is None and len(new) > COMBINATIONS:
        return []
    found = []
    for question in ask(folder, new, strict=candidates is not None) if new else []:
        if covers(law, question):
            hours = rate(question.facts["train_flops"])
            found.append(Candidate(question.overrides, (), question.x(law)[0], hours))
    return found


# --- the choice ---


def _chosen(
    belief: Belief, at: Array, options: Sequence[Candidate], hours: float, seeds: int
) -> list[dict[str, Any]]:
    """Returns the runs to make, in order, as `advise` does."""
    curve = np.log(belief.curve(np.concatenate([at, *(option.x[None] for option in options)])))  # [P, 1 + M]
    covariance = np.cov(curve, rowvar=False)
    of_point, of_seed = _variances(belief)
    noise = of_point + of_seed / seeds
    start = covariance[0, 0] + noise
    options = list(options)
    advice: list[dict[str, Any]] = []
    while True:
        gains = []
        for i, option in enumerate(options, 1):
            unknown = covariance[i, i] + 1 / _information(len(option.seeds), of_point, of_seed)
            left = covariance[0, 0] - covariance[0, i] ** 2 / unknown
            gains.append(np.log((covariance[0, 0] + noise) / (left + noise)) / option.hours)
        affordable = [i for i, option in enumerate(options) if option.hours <= hours]
        best = max(affordable, key=lambda i: gains[i], default=None)
        if best is None or gains[best] * options[best].hours < 2 * LEAST:
            return advice
        option, row = options[best], covariance[best + 1]
        information = _information(len(option.seeds), of_point, of_seed)
        covariance = covariance - np.outer(row, row) / (row[best + 1] + 1 / information)
        seed = next(n for n in itertools.count() if n not in option.seeds)
        options[best] = dataclasses.replace(option, seeds=(*option.seeds, seed))
        hours -= option.hours
        advice.append({
            "overrides": {**option.overrides, SEED: seed}, "hours": option.hours,
            "shrinkage": float(1 - np.sqrt((covariance[0, 0] + noise) / start)),
        })  # fmt: skip


def _variances(belief: Belief) -> tuple[float, float]:
    """Returns the variances of log y between configurations, and between the runs of one.

    Where each configuration has one run, they cannot be told apart: half is given to each.
    """
    spread = {name: float(np.mean(draws**2)) for name, draws in belief.posteriors[0].spread.items()}
    within = sum(value for name, value in spread.items() if name != "configurations")
    if not within:
        return spread["configurations"] / 2, spread["configurations"] / 2
    return spread["configurations"], within


def _information(runs: int, of_point: float, of_seed: float) -> float:
    """Returns how much one more run adds to what its configuration tells of the curve, as a precision."""
    after = 1 / (of_point + of_seed / (runs + 1))
    return after - (1 / (of_point + of_seed / runs) if runs else 0.0)


def text(advice: Sequence[Mapping[str, Any]]) -> str:
    """Returns advice as lines to read."""
    if not advice:
        return "no run that fits into the hours narrows the interval; give more hours"
    total = 0.0
    lines = []
    for run in advice:
        total += run["hours"]
        flags = " ".join(f"{key}={value}" for key, value in run["overrides"].items())
        lines.append(
            f"{flags}: {run['hours']:.2g} h, {total:.2g} h so far; narrower by {run['shrinkage']:.0%}"
        )
    return "\n".join(lines)
