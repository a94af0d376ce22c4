"""A study folder as a table: one row for each run and evaluated step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scaling.errors import UserError
from scaling.files import write_atomic
from scaling.former_names import current_key, renamed
from scaling.run.folder import METRICS, read_description, read_evaluations, read_events, read_status
from scaling.study.sweep import Overrides, Study, is_seed, stored
from scaling.study.sweep import load as load_study

FACTS = ("depth", "width", "heads", "patch")  # facts of the model, where config.json has them
COSTS = ("params", "gmacs", "tokens", "train_flops")
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

    @property
    def label(self) -> str:
        """The run's name without its seed, such as `F/7` or `F/7 depth=4`."""
        return point_label(self.overrides)


@dataclass(frozen=True)
class StudyFolder:
    """A study folder, read. `table` has the columns of `results.csv`."""

    path: Path
    study: Mapping[str, Any]  # study.json
    runs: list[RunRecord]
    table: pd.DataFrame

    @property
    def swept(self) -> list[str]:
        """The dotted config names that vary between runs."""
        return [c for c in self.table.columns if "." in c]

    @property
    def metrics(self) -> list[str]:
        """The names of the measured values."""
        known = {"run", "step", *self.swept, *FACTS, *COSTS}
        return [c for c in self.table.columns if c not in known]

    def done(self) -> list[str]:
        """Returns the names of the runs that are done."""
        return [run.name for run in self.runs if run.status == "done"]


def load(workdir: Path | str) -> pd.DataFrame:
    """Loads the table of a study folder.

    Its columns are `run`, `step`, the swept keys, the model's depth, width, heads and patch, `params`,
    `gmacs` (1e9 multiply-adds of one forward pass of one example), `tokens`, `train_flops` (FLOPs of
    training up to the step), then metrics.

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
    table = _read_table(path)
    return StudyFolder(path, study, _records_of_table(path, runs, table), table)


def read_runs(study: Study, workdir: Path | str) -> StudyFolder:
    """Reads the runs that a script trained in `workdir/runs/NAME`, one for each of `study.runs()`."""
    return _read_runs(Path(workdir), study.as_json(str(workdir)))


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
    study, table = load_study(path).as_json(str(path)), _read_table(path)
    runs = _shipped_runs(study["runs"], table)
    return StudyFolder(path, {**study, "runs": runs}, _records_of_table(path, runs, table), table)


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path / "results.csv").rename(columns=current_key)


def _shipped_runs(sweep: Mapping[str, Overrides], table: pd.DataFrame) -> dict[str, Overrides]:
    """Returns the overrides of the table's runs, and of those in the study's sweep that the table lacks.

    The table may have more runs than the sweep (of more seeds), and other names for them.
    """
    keys = [column for column in table.columns if "." in column]
    rows = table.drop_duplicates("run")
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
    write_atomic(file, folder.table.to_csv(index=False))
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
    try:
        status = read_status(folder)
    except UserError as e:
        return RunRecord(folder.name, folder, overrides, "broken", str(e), 0, 0, _read_config(folder)[0])
    config, fault = _read_config(folder)
    if fault and (fault != ABSENT or (status and status["status"] == "done")):
        step, steps = (status["step"], status["steps"]) if status else (0, 0)
        return RunRecord(folder.name, folder, overrides, "broken", fault, step, steps, config)
    if status is None and config:
        fault = f"{folder / 'status.json'}: is missing; the same sweep finds out where the run is"
        return RunRecord(folder.name, folder, overrides, "broken", fault, 0, 0, config)
    if status is None:
        reason = last_line(folder / "log.txt")
        kind = "failed" if reason else "missing"
        return RunRecord(folder.name, folder, overrides, kind, reason, 0, 0, config)
    kind, reason = status["status"], status.get("reason")
    if kind == "running" and time.time() - status["heartbeat"] > SILENT_SECONDS:
        kind, reason = "broken", f"ended without a word at step {status['step']}"
    if kind == "done" and all(event["step"] != status["steps"] for event in read_events(folder)):
        lost = f"{folder / METRICS}: has no line of the last step, {status['steps']}"
        kind, reason = "broken", f"{lost}; put it back, or delete the run to train it again"
    return RunRecord(folder.name, folder, overrides, kind, reason, status["step"], status["steps"], config)


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


def _records_of_table(path: Path, overrides: Mapping[str, Overrides], table: pd.DataFrame) -> list[RunRecord]:
    last = table.groupby("run")["step"].max()
    return [
        RunRecord(name, path / "runs" / name, values, "done", None, int(last[name]), int(last[name]), {})
        if name in last.index
        else RunRecord(name, path / "runs" / name, values, "missing", None, 0, 0, {})
        for name, values in overrides.items()
    ]


def _table(runs: list[RunRecord]) -> pd.DataFrame:
    swept = list(dict.fromkeys(key for run in runs for key in run.overrides))
    rows = [row for run in runs for row in _rows(run, swept)]
    known = ["run", "step", *swept, *FACTS, *COSTS]
    metrics = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    facts = [f for f in FACTS if any(row.get(f) is not None for row in rows)]
    table = pd.DataFrame(rows, columns=["run", "step", *swept, *facts, *COSTS, *metrics])
    costs = table[["params", "gmacs", "train_flops"]].apply(pd.to_numeric)  # of runs without a config: NaN
    return table.assign(**costs)


def _rows(run: RunRecord, swept: list[str]) -> list[dict[str, Any]]:
    cost, model = run.config.get("cost") or {}, run.config.get("model") or {}
    try:
        evaluations = read_evaluations(run.folder)
    except UserError:
        return []
    return [
        {
            "run": run.name,
            "step": step,
            **{
                key: _table_cell(run.overrides.get(key, _lookup(run.config.get("config", {}), key)))
                for key in swept
            },
            **{fact: _table_cell(model.get(fact)) for fact in FACTS},
            **{name: cost.get(name) for name in ("params", "gmacs", "tokens")},
            "train_flops": cost["train_flops_per_step"] * step if cost else None,
            **values,
        }
        for step, values in evaluations.items()
    ]


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _table_cell(value: Any) -> Any:
    """Returns a value that compares and prints: sequences as `2x4`."""
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value
