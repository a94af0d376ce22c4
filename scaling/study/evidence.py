"""Evidence for the laws of a study: the values that count, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.errors import UserError
from scaling.laws.values import Values, of_table
from scaling.study.metric import Metric
from scaling.study.results import StudyFolder
from scaling.study.sweep import MODEL_NAME

DURATION, OPTIMIZER = "train.duration", "optimizer."


@dataclass(frozen=True)
class Evidence:
    """The values of a study that a law may be fitted to.

    Attributes:
        metric: of which y is made.
        table: one row for each value: `run`, `step`, `point` (its configuration), `size` (without its
            duration), `group` (its family, where the study has several), `gmacs`, `gmacs_per_token`,
            `params`, `tokens`, `examples`, `train_flops`, `y`, `error` (known standard error of y, else
            0), and `last` (whether it is of the end of a run).
        left_out: what was left out and why, a line each.
        measured_floor: y of real data against real data, where it was measured.
    """

    metric: Metric
    table: pd.DataFrame
    left_out: tuple[str, ...]
    measured_floor: float | None = None

    @property
    def groups(self) -> list[str]:
        """The families; one that is "" where there is only one."""
        return list(dict.fromkeys(self.table["group"]))

    def values(self, table: pd.DataFrame, x: Sequence[str], point: str = "point") -> Values:
        """Returns values of some of the rows, as a law takes them."""
        return of_table(table, x, "y", point=point, run="run", standard_error="error")


def with_y(folder: StudyFolder) -> pd.DataFrame:
    """Returns the rows with `y` and its known standard `error`, where y can be drawn.

    It is positive then, and of a run whose cost is known, with the best learning rate of those swept.
    """
    metric, table = folder.metric, folder.table
    if metric.name not in table:
        return table.assign(y=np.nan, error=0.0).iloc[:0]
    value = table[metric.name].astype(float)
    table = table.assign(y=metric.y(value), error=_error(table, metric))
    table = table[np.isfinite(table["y"]) & (table["y"] > 0) & table["gmacs"].notna()]
    steps = {run.name: run.steps for run in folder.runs}
    best, _ = _best_of_tuned(folder, table.assign(last=table["step"] == table["run"].map(steps)))
    return best.drop(columns="last").astype({"params": np.int64})


def evidence(folder: StudyFolder) -> Evidence:
    """Returns the values that count: of runs that did not fail, where the learning rate had come to its end.

    With a constant rate every value counts, with any other those of a run's last step.
    """
    metric, table = folder.metric, folder.table
    if metric.name not in table:
        table = table.assign(**{metric.name: np.nan}).iloc[:0]
    states, measured = {run.name: run for run in folder.runs}, set(table["run"])
    reasons: dict[str, str] = {
        run.name: f"{run.status}{f', {run.reason}' if run.reason else ''}"
        for run in folder.runs
        if run.status == "failed" or run.name not in measured
    }
    kept = []
    for name, rows in table.groupby("run", sort=False):
        run = states[str(name)]
        rows, why = (rows.iloc[:0], None) if name in reasons else _usable(rows, metric, run.steps)
        kept.append(rows.assign(last=rows["step"] == run.steps))
        if why:
            reasons[run.name] = why
    counted = pd.concat(kept) if kept else table.assign(last=False)
    described = _described(folder, counted, metric)
    described, worse = _best_of_tuned(folder, described)
    reasons |= worse
    left_out = tuple(f"{name}: {why}" for name, why in reasons.items())
    return Evidence(metric, described, left_out, measured_floor(folder))


def measured_floor(folder: StudyFolder) -> float | None:
    """Returns the metric of real data against real data, where it was measured."""
    column = folder.table.get(folder.metric.measured_floor)
    return float(column.median()) if column is not None and column.notna().any() else None


def _usable(rows: pd.DataFrame, metric: Metric, steps: int) -> tuple[pd.DataFrame, str | None]:
    """Returns the rows of a run that count, and why some that were measured do not."""
    last = rows["step"] == steps
    value = rows[metric.name].astype(float)
    if rows["gmacs"].isna().any():
        return rows.iloc[:0], "its cost is not known, as its config.json is gone"
    if not np.isfinite(value[last]).any():
        rows = rows[np.isfinite(value)]
        if "annealed" not in rows or not rows["annealed"].astype(bool).any():
            return rows.iloc[:0], f"no {metric.name} at its last step, {steps}"
        value, last = value[rows.index], last[rows.index]
    measured = np.isfinite(value)
    annealed = last | (rows["annealed"].astype(bool) if "annealed" in rows else False)
    y = metric.y(value)
    positive = (y > 0) & np.isfinite(y)
    parts = []
    if early := int((measured & ~annealed).sum()):
        parts.append(f"{early} values from before the end of its learning rate's schedule")
    for _, row in rows[measured & annealed & ~positive].iterrows():
        parts.append(
            f"{metric.name}={row[metric.name]:g} at step {row['step']}, whose {metric.label} has no logarithm"
        )
    return rows[measured & annealed & positive], "; ".join(parts) or None


def _described(folder: StudyFolder, rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Returns the rows with the columns of `Evidence.table`."""
    value = rows[metric.name].astype(float)
    group = rows[MODEL_NAME].astype(str) if rows.get(MODEL_NAME, pd.Series(dtype=str)).nunique() > 1 else ""
    return pd.DataFrame({
        "run": rows["run"], "step": rows["step"],
        "point": rows["run"].map(configurations(folder)),
        "size": rows["run"].map(configurations(folder, DURATION)),
        "group": group, "last": rows["last"],
        **{name: rows[name].astype(float) for name in ("gmacs", "params", "tokens", "train_flops")},
        "gmacs_per_token": rows["gmacs"].astype(float) / rows["tokens"].astype(float),
        "examples": rows["examples"].astype(float) if "examples" in rows else np.nan,
        "y": metric.y(value), "error": _error(rows, metric),
    }).reset_index(drop=True)  # fmt: skip


def configurations(folder: StudyFolder, *but: str) -> dict[str, str]:
    """Returns the configuration of each run by its name, without seeds, `but` and what was tuned."""
    return folder.labels(*but, *(key for key in folder.swept if key.startswith(OPTIMIZER)))


def _best_of_tuned(folder: StudyFolder, rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Returns the rows of each configuration with its best values of the optimiser, or those carried on.

    A swept rate is no configuration of a law.

    Returns:
        The rows, and why the runs of others do not count.
    """
    setting = rows["run"].map(folder.labels(*(k for k in folder.swept if not k.startswith(OPTIMIZER))))
    if setting.nunique() < 2:
        return rows, {}
    rows = rows.assign(setting=setting, configuration=rows["run"].map(configurations(folder)))
    carried = None
    if folder.study["tune"]:
        carried = rows.groupby("setting")["configuration"].nunique().idxmax()
    worse: dict[str, str] = {}
    kept = []
    for _, mine in rows.groupby("configuration", sort=False):
        ends = mine[mine["last"]] if mine["last"].any() else mine
        best = str(np.log(ends["y"]).groupby(ends["setting"]).mean().idxmin())
        if carried in set(mine["setting"]):
            best = str(carried)
        kept.append(mine[mine["setting"] == best])
        why = f"tuning: {best} was {'carried on' if best == carried else 'better'}"
        worse |= {str(name): why for name in mine.loc[mine["setting"] != best, "run"].unique()}
    return pd.concat(kept).drop(columns=["setting", "configuration"]), worse


def _error(rows: pd.DataFrame, metric: Metric) -> pd.Series:
    """Returns the known standard error of each y, 0 where there is none.

    That of a loss does not count, since it is of the same examples and noise in every run.
    """
    if metric.kind == "loss" or metric.standard_error not in rows:
        return pd.Series(0.0, index=rows.index)
    value, error = rows[metric.name].astype(float), rows[metric.standard_error].astype(float)
    return pd.Series(metric.error(value, error), index=rows.index).fillna(0.0)


def at_the_end(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the values of the ends of runs, of the number of examples that most runs saw.

    Runs of other durations are not of the same law in gmacs.
    """
    last = table[table["last"]]
    counts = last["examples"].value_counts()
    if len(counts) < 2:
        return last
    commonest = max(counts[counts == counts.max()].index)
    return last[last["examples"] == commonest]


def require_metric(folder: StudyFolder) -> None:
    """Checks that some run was measured by the study's metric.

    Raises:
        UserError: if none was; it names the metrics that there are.
    """
    metric = folder.metric.name
    if metric not in folder.table or not folder.table[metric].notna().any():
        there = ", ".join(folder.metrics) or "none"
        raise UserError(f"{folder.path}: no run has been evaluated for {metric}; the table has {there}")
