"""A study folder as a table: one row for each run and evaluated step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from scaling.errors import UserError
from scaling.files import write_atomic
from scaling.former_names import current_key, renamed
from scaling.run.folder import (
    EVALUATIONS,
    METRICS,
    evaluations_of,
    read_description,
    read_events,
    read_status,
)
from scaling.study.metric import Metric, metric_of
from scaling.study.sweep import Overrides, Study, is_seed, stored
from scaling.study.sweep import load as load_study

FACTS = ("depth", "width", "heads", "patch")  # facts of the model, where config.json has them
COSTS = ("params", "gmacs", "tokens", "train_flops")
# What is known of each value: the examples seen, the wall time so far, and whether it is an annealed one.
TRAINING = ("examples", "hours", "annealed")
STATE = ("status", "steps", "reason")  # columns of the file alone, which say how each run ended
ABSENT = "its config.json is gone, and with it what the run cost; put the file back"
SILENT_SECONDS = 600.0  # time without a heartbeat after which a running run counts as broken


@dataclass(frozen=True)
class RunRecord:
    """One run of a study as its folder describes it. `status` adds `missing` (never started) and `broken`."""

    name: str
    folder: Path
    overrides: Mapping[str, Any]
    status: str
    reason: str | None
    step: int
    steps: int
    config: Mapping[str, Any]  # the whole config.json, {} if there is none
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # by step
    hours: Mapping[int, float] = field(default_factory=dict)  # of training, by evaluated step


@dataclass(frozen=True)
class StudyFolder:
    """A study folder, read. `table` has the columns of `results.csv`."""

    path: Path
    study: Mapping[str, Any]  # study.json
    runs: list[RunRecord]
    table: pd.DataFrame

    @property
    def metric(self) -> Metric:
        """The study's metric."""
        return metric_of(self.study["metric"])

    @property
    def swept(self) -> list[str]:
        """The dotted config names that vary between runs."""
        return [c for c in self.table.columns if "." in c]

    @property
    def metrics(self) -> list[str]:
        """The names of the measured values."""
        known = {"run", "step", *self.swept, *FACTS, *COSTS, *TRAINING}
        return [c for c in self.table.columns if c not in known]

    def labels(self, *but: str) -> dict[str, str]:
        """Returns the configuration of each run by its name: the keys that vary, but seeds and `but`."""
        rows = self.table.drop_duplicates("run").set_index("run")[self.swept].to_dict("index")
        cells: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            row = rows.get(run.name) or run.overrides
            cells[run.name] = {str(key): _table_cell(v) for key, v in row.items() if not _absent(v)}
        keys = list(dict.fromkeys(key for values in cells.values() for key in values))
        varied = [key for key in keys if len({str(values.get(key)) for values in cells.values()}) > 1]
        kept = [key for key in varied if not is_seed(key) and key not in but]
        return {name: point_label({key: values.get(key) for key in kept}) for name, values in cells.items()}

    def done(self) -> list[str]:
        """Returns the names of the runs that are done."""
        return [run.name for run in self.runs if run.status == "done"]


def load(workdir: Path | str) -> pd.DataFrame:
    """Loads the table of a study folder.

    Its columns are `run`, `step`, the swept keys, the model's depth, width, heads and patch, `params`,
    `gmacs` (1e9 multiply-adds of one forward pass of one example), `tokens`, `train_flops` (FLOPs of
    training up to the step), `examples` and `hours` (of training up to the step), `annealed` (whether the
    rate had come to its end), then metrics.

    Raises:
        UserError: if the folder is not a study's.
    """
    return read(workdir).table


def read(workdir: Path | str) -> StudyFolder:
    """Reads the runs of a study folder, or its `results.csv` where the runs themselves are not at hand.

    A folder that ships a `study.py` with its `results.csv` needs no `study.json`. Keys of older studies are
    read in today's names.

    Raises:
        UserError: if the folder is not a study's, or holds neither runs nor results.
    """
    path = Path(workdir)
    study = stored(path)
    if study is None:
        return _read_shipped(path)
    runs = {name: renamed(overrides) for name, overrides in study["runs"].items()}
    study = {**study, "runs": runs, "overrides": renamed(study.get("overrides", {}))}
    if (path / "runs").is_dir():
        return _read_runs(path, study)
    if not (path / "results.csv").is_file():
        raise UserError(f"{path}: has neither runs nor results.csv; start it with `scaling sweep`")
    table, states = _read_table(path)
    return StudyFolder(path, study, _records_of_table(path, runs, states), table)


def read_runs(study: Study, workdir: Path | str) -> StudyFolder:
    """Reads the runs that a script trained in `workdir/runs/NAME`, one for each of `study.runs()`."""
    return _read_runs(Path(workdir), study.as_json(str(workdir)))


def last_values(study: Study, runs: Mapping[str, Overrides], workdir: Path) -> dict[str, float]:
    """Returns the y of each run that is done, at its last step, by its name."""
    folder = _read_runs(workdir, {**study.as_json(str(workdir)), "runs": dict(runs)})
    table, metric = folder.table, folder.metric
    found = {}
    for run in folder.runs:
        last = table[(table["run"] == run.name) & (table["step"] == run.steps)]
        if run.status == "done" and metric.name in last and len(last):
            y = metric.y(float(last[metric.name].iloc[-1]))
            if y > 0:  # also false for NaN
                found[run.name] = y
    return found


def _read_runs(path: Path, study: Mapping[str, Any]) -> StudyFolder:
    records = [_read_run(path / "runs" / name, overrides) for name, overrides in study["runs"].items()]
    return StudyFolder(path, study, records, _table(records))


def _read_shipped(path: Path) -> StudyFolder:
    """Reads a folder with a study file and its results, such as `experiments/mnist_dit`."""
    if not (path / "study.py").is_file() or not (path / "results.csv").is_file():
        raise UserError(
            f"{path}: has no study.json; give the folder that `scaling sweep` wrote, or one with a study.py "
            "and its results.csv"
        )
    study, (table, states) = load_study(path).as_json(str(path)), _read_table(path)
    runs = _shipped_runs(study["runs"], states)
    return StudyFolder(path, {**study, "runs": runs}, _records_of_table(path, runs, states), table)


def _read_table(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the table of a `results.csv`, and one row for each run: its swept values and its state."""
    file = path / "results.csv"
    written = pd.read_csv(file).rename(columns=current_key)
    if missing := [column for column in ("run", "step", *COSTS) if column not in written]:
        raise UserError(f"{file}: has no column {missing[0]}; put back the file that the report wrote")
    states = written.groupby("run", sort=False, as_index=False).last()
    if "status" not in written:  # of an older study, which shipped done runs alone
        states = states.assign(status="done", steps=states["step"], reason=None)
    rows = written[written["step"] > 0] if "status" in written else written
    return rows.drop(columns=list(STATE), errors="ignore").reset_index(drop=True), states


def _written(folder: StudyFolder) -> pd.DataFrame:
    """Returns the table with the state of each run; a run without any value has a row of step 0."""
    keys = {
        run.name: {key: _table_cell(value) for key, value in run.overrides.items()} for run in folder.runs
    }
    states = pd.DataFrame(
        [
            {"run": run.name, "status": run.status, "steps": run.steps, "reason": run.reason}
            for run in folder.runs
        ],
        columns=["run", *STATE],
    )
    measured = set(folder.table["run"])
    silent = [{"run": name, "step": 0, **keys[name]} for name in keys if name not in measured]
    table = pd.concat([folder.table, pd.DataFrame(silent)]) if silent else folder.table
    return table.merge(states, on="run", how="left")


def _shipped_runs(sweep: Mapping[str, Overrides], rows: pd.DataFrame) -> dict[str, Overrides]:
    """Returns the overrides of the table's runs, and of those in the study's sweep that the table lacks.

    The table may have more runs than the sweep (of more seeds), and other names for them.
    """
    keys = [column for column in rows.columns if "." in column]
    measured = {
        str(name): {str(key): value for key, value in row.items() if pd.notna(value)}
        for name, row in zip(rows["run"], rows[keys].to_dict("records"), strict=True)
    }
    lacking = {
        name: overrides
        for name, overrides in sweep.items()
        if not any(_same_values(overrides, values) for values in measured.values())
    }
    return measured | lacking


def _same_values(overrides: Overrides, values: Mapping[str, Any]) -> bool:
    """Returns whether overrides have these values of a table, where 4 may have become 4.0, and "50" 50."""
    pairs = [(_table_cell(value), values.get(key)) for key, value in overrides.items()]
    return all(swept == stored or str(swept) == str(stored) for swept, stored in pairs)


def write(folder: StudyFolder) -> Path:
    """Writes `results.csv` into the study folder."""
    file = folder.path / "results.csv"
    write_atomic(file, _written(folder).to_csv(index=False))
    return file


def point_label(overrides: Mapping[str, Any]) -> str:
    """Returns a short name for the overrides without seeds: model and variant bare, others as `key=value`."""
    parts = [
        str(value) if key.endswith(("model.name", ".variant")) else f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in overrides.items()
        if not is_seed(key) and pd.notna(value)
    ]
    return " ".join(parts) or "base"


def _read_run(folder: Path, overrides: Mapping[str, Any]) -> RunRecord:
    config, fault = _read_config(folder)
    evaluations: dict[int, dict[str, float]] = {}
    hours: dict[int, float] = {}
    try:
        events = read_events(folder)
        hours = {e["step"]: e["wall"] / 3600 for e in reversed(events) if "wall" in e and "step" in e}
        evaluations = evaluations_of([*events, *read_events(folder, EVALUATIONS)])
        state = _state(folder, config, fault, events)
    except UserError as e:
        state = "broken", str(e), 0, 0
    return RunRecord(folder.name, folder, overrides, *state, config, evaluations, hours)


def _state(
    folder: Path, config: Mapping[str, Any], fault: str | None, events: Sequence[Mapping[str, Any]]
) -> tuple[str, str | None, int, int]:
    """Returns the status, the reason, the step and the number of steps of a run's `RunRecord`.

    Raises:
        UserError: if `status.json` cannot be read.
    """
    status = read_status(folder)
    step, steps = (status["step"], status["steps"]) if status else (0, 0)
    if fault and (fault != ABSENT or (status and status["status"] == "done")):
        return "broken", fault, step, steps
    if status is None and config:
        lost = f"{folder / 'status.json'}: is missing"
        return "broken", f"{lost}; the same sweep finds out where the run is", step, steps
    if status is None:
        reason = last_line(folder / "log.txt")
        return "failed" if reason else "missing", reason, step, steps
    if status["status"] == "running" and time.time() - status["heartbeat"] > SILENT_SECONDS:
        return "broken", f"ended without a word at step {step}", step, steps
    if status["status"] == "done" and all(event["step"] != steps for event in events):
        lost = f"{folder / METRICS}: has no line of the last step, {steps}"
        return "broken", f"{lost}; put it back, or delete the run to train it again", step, steps
    return status["status"], status.get("reason"), step, steps


def _read_config(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Returns a run's config.json, {} if it cannot be read, and why not."""
    try:
        described = read_description(folder)
    except UserError as e:
        return {}, str(e)
    if described is None:
        return {}, ABSENT
    return {**described, "config": renamed(described["config"])}, None


def last_line(log: Path) -> str | None:
    """Returns the last line of a log that is not blank, without a leading `error: `."""
    if not log.is_file():
        return None
    lines = [
        line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()
    ]
    return lines[-1].strip().removeprefix("error: ") if lines else None


def _records_of_table(
    path: Path, overrides: Mapping[str, Overrides], states: pd.DataFrame
) -> list[RunRecord]:
    rows = states.set_index("run").to_dict("index")
    records = []
    for name, values in overrides.items():
        state: tuple[str, str | None, int, int] = ("missing", None, 0, 0)
        if name in rows:
            row = rows[name]
            reason = None if pd.isna(row["reason"]) else str(row["reason"])
            state = row["status"], reason, int(row["step"]), int(row["steps"])
        records.append(RunRecord(name, path / "runs" / name, values, *state, {}))
    return records


def _table(runs: list[RunRecord]) -> pd.DataFrame:
    swept = list(dict.fromkeys(key for run in runs for key in run.overrides))
    rows = [row for run in runs for row in _rows(run, swept)]
    known = ["run", "step", *swept, *FACTS, *COSTS, *TRAINING]
    metrics = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    facts = [f for f in FACTS if any(row.get(f) is not None for row in rows)]
    table = pd.DataFrame(rows, columns=["run", "step", *swept, *facts, *COSTS, *TRAINING, *metrics])
    costs = table[["params", "gmacs", "train_flops"]].apply(pd.to_numeric)  # of runs without a config: NaN
    return table.assign(**costs)


def _rows(run: RunRecord, swept: list[str]) -> list[dict[str, Any]]:
    cost, model = run.config.get("cost") or {}, run.config.get("model") or {}
    config = run.config.get("config", {})
    constant = _lookup(config, "optimizer.schedule") == "constant"
    batch = _lookup(config, "data.batch_size")
    return [
        {
            "run": run.name,
            "step": step,
            **{key: _table_cell(run.overrides.get(key, _lookup(config, key))) for key in swept},
            **{fact: _table_cell(model.get(fact)) for fact in FACTS},
            **{name: cost.get(name) for name in ("params", "gmacs", "tokens")},
            "train_flops": cost["train_flops_per_step"] * step if cost else None,
            "examples": batch * step if batch else None,
            "hours": run.hours.get(step),
            "annealed": constant or step == run.steps,
            **values,
        }
        for step, values in run.evaluations.items()
    ]


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _absent(value: Any) -> bool:
    return value is None or value != value


def _table_cell(value: Any) -> Any:
    """Returns a value that compares and prints: sequences as `2x4`."""
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value
