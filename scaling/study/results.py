"""A study folder as a table: a row for each run and evaluated step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scaling.engine.runfolder import read_events
from scaling.errors import UserError
from scaling.files import read_json, write_atomic
from scaling.study.sweep import is_seed

FACTS = ("depth", "width", "heads", "patch")  # of the model, where config.json knows them
COSTS = ("params", "gmacs", "tokens", "train_flops")
SILENT_SECONDS = 600.0  # a running run without a heartbeat for so long has ended without a word


@dataclass(frozen=True)
class Run:
    """One run of a study as its folder tells it. `status` adds `missing` (never started) and `broken`."""

    name: str
    folder: Path
    overrides: Mapping[str, Any]
    status: str
    reason: str | None
    step: int
    steps: int
    config: Mapping[str, Any]  # all of config.json, {} if there is none

    @property
    def label(self) -> str:
        """The run without its seed, such as `F/7` or `F/7 depth=4`."""
        return point_label(self.overrides)


@dataclass(frozen=True)
class StudyFolder:
    """A study folder read whole. `table` has the columns of `results.csv`."""

    path: Path
    study: Mapping[str, Any]  # study.json
    runs: list[Run]
    table: pd.DataFrame

    @property
    def swept(self) -> list[str]:
        """The dotted config names that vary between runs."""
        return [c for c in self.table.columns if "." in c]

    @property
    def metrics(self) -> list[str]:
        known = {"run", "step", *self.swept, *FACTS, *COSTS}
        return [c for c in self.table.columns if c not in known]

    def done(self) -> list[str]:
        return [run.name for run in self.runs if run.status == "done"]


def load(workdir: Path | str) -> pd.DataFrame:
    """The table of a study folder: `run`, `step`, the swept keys, the model's depth, width, heads and patch,
    `params`, `gmacs` (1e9 multiply-adds of one forward pass of one example), `tokens`, `train_flops`
    (FLOPs of training up to the step), then metrics.

    Raises:
        UserError: if the folder is not a study's.
    """
    return read(workdir).table


def read(workdir: Path | str) -> StudyFolder:
    """Reads the runs of a study folder, or its `results.csv` where the runs themselves are not at hand.

    Raises:
        UserError: if the folder is not a study's, or holds neither runs nor results.
    """
    path = Path(workdir)
    study = read_json(path / "study.json")
    if study is None:
        raise UserError(f"{path}: has no study.json; give the folder that `scaling sweep` wrote")
    overrides: dict[str, Any] = study["runs"]
    if (path / "runs").is_dir():
        runs = [_run(path / "runs" / name, values) for name, values in overrides.items()]
        return StudyFolder(path, study, runs, _table(runs))
    if not (path / "results.csv").is_file():
        raise UserError(f"{path}: has neither runs nor results.csv; start it with `scaling sweep`")
    table = pd.read_csv(path / "results.csv")
    return StudyFolder(path, study, _runs_of_table(path, overrides, table), table)


def write(folder: StudyFolder) -> Path:
    """Writes `results.csv` into the study folder."""
    file = folder.path / "results.csv"
    write_atomic(file, folder.table.to_csv(index=False))
    return file


def point_label(overrides: Mapping[str, Any]) -> str:
    """A short name for the overrides without seeds: family and variant bare, others as `key=value`."""
    parts = [
        str(value) if key.endswith((".family", ".variant")) else f"{key.rsplit('.', 1)[-1]}={value}"
        for key, value in overrides.items()
        if not is_seed(key) and pd.notna(value)
    ]
    return " ".join(parts) or "base"


def _run(folder: Path, overrides: Mapping[str, Any]) -> Run:
    try:
        status = read_json(folder / "status.json")
        config = read_json(folder / "config.json") or {}
    except UserError as e:
        return Run(folder.name, folder, overrides, "broken", str(e), 0, 0, {})
    if status is None:
        reason = last_line(folder / "log.txt")
        kind = "failed" if reason else "missing"
        return Run(folder.name, folder, overrides, kind, reason, 0, 0, config)
    kind, reason = status["status"], status.get("reason")
    if kind == "running" and time.time() - status["heartbeat"] > SILENT_SECONDS:
        kind, reason = "broken", f"ended without a word at step {status['step']}"
    return Run(folder.name, folder, overrides, kind, reason, status["step"], status["steps"], config)


def last_line(log: Path) -> str | None:
    """The last line of a log that says anything, without a leading `error: `."""
    if not log.is_file():
        return None
    lines = [
        line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()
    ]
    return lines[-1].strip().removeprefix("error: ") if lines else None


def _runs_of_table(path: Path, overrides: Mapping[str, Any], table: pd.DataFrame) -> list[Run]:
    last = table.groupby("run")["step"].max()
    return [
        Run(name, path / "runs" / name, values, "done", None, int(last[name]), int(last[name]), {})
        if name in last.index
        else Run(name, path / "runs" / name, values, "missing", None, 0, 0, {})
        for name, values in overrides.items()
    ]


def _table(runs: list[Run]) -> pd.DataFrame:
    swept = list(dict.fromkeys(key for run in runs for key in run.overrides))
    rows = [row for run in runs for row in _rows(run, swept)]
    known = ["run", "step", *swept, *FACTS, *COSTS]
    metrics = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    facts = [f for f in FACTS if any(row.get(f) is not None for row in rows)]
    return pd.DataFrame(rows, columns=["run", "step", *swept, *facts, *COSTS, *metrics])


def _rows(run: Run, swept: list[str]) -> list[dict[str, Any]]:
    cost, model = run.config.get("cost"), run.config.get("model", {})
    if cost is None:
        return []
    steps: dict[int, dict[str, float]] = {}
    for event in read_events(run.folder):
        if event["event"] == "evaluate":
            steps.setdefault(event["step"], {}).update(event["values"])
    return [
        {
            "run": run.name,
            "step": step,
            **{
                key: _plain(run.overrides.get(key, _lookup(run.config.get("config", {}), key)))
                for key in swept
            },
            **{fact: _plain(model.get(fact)) for fact in FACTS},
            **{name: cost[name] for name in ("params", "gmacs", "tokens")},
            "train_flops": cost["train_flops_per_step"] * step,
            **values,
        }
        for step, values in sorted(steps.items())
    ]


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _plain(value: Any) -> Any:
    """A cell that compares and prints: sequences as `2x4`."""
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value
