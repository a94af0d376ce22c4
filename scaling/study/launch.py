"""`scaling sweep STUDY --workdir W`: starts a study's runs, and keeps those that are done."""

import functools
import json
import os
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.former_names import renamed
from scaling.overrides import FLAG, override_flags, parse_overrides
from scaling.study import pool
from scaling.study.claim import Bases, claim, locked, refuse_other_configs
from scaling.study.jobs import Job
from scaling.study.launchers import LAUNCHERS
from scaling.study.sweep import Overrides, Study, load, run_names, stored, without_seed


def sweep(
    study_path: Path | str,
    workdir: Path | str,
    workers: int = 1,
    extra_overrides: Sequence[str] = (),
    launcher: str = "local",
) -> int:
    """Runs a study to its end, then writes its report. The same command resumes it.

    Done runs are kept; broken and interrupted ones are resumed; failed ones are listed with their reasons
    when all others have ended.

    Args:
        study_path: a folder with a `study.py`, or a Python file with `STUDY`.
        workdir: the study folder.
        workers: number of runs at a time; on this machine, its cores are split between them.
        extra_overrides: `["train.duration=100 steps", ...]` for every run (`--config.` in front is fine).
        launcher: where the runs are computed, one of `LAUNCHERS`.

    Returns:
        The exit code: 0 if every run is done, 1 if any failed, 128 + the signal's number if one stopped it.

    Raises:
        UserError: before anything is started, if the study, an override or the folder is wrong.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    if launcher not in LAUNCHERS:
        raise UserError(f"launcher={launcher!r}: must be one of {', '.join(LAUNCHERS)}")
    study, root = load(study_path), Path(workdir).absolute()
    extra = parse_overrides(extra_overrides)
    bases = {source: load_config(source, extra) for source in map(study.config_of, study.sweep)}
    start = functools.partial(LAUNCHERS[launcher], _environment(root))
    plan = _Plan(
        study, str(study_path), root, extra, bases, _classifiers(study, root, extra, bases), workers, start
    )
    runs = _named_as_stored(study, root)
    features, first = plan.check(runs), _tuning_runs(study, runs, extra)
    plan.check(first)
    with locked(root):
        stopped, failed = plan.train(runs, first, features)
        if stopped is None:
            write_report(root)
    return _exit_code(
        stopped, failed, shlex.join(_command(str(study_path), workdir, workers, extra_overrides))
    )


@dataclass(frozen=True)
class _Plan:
    """All that a sweep was asked for, and how its jobs are started."""

    study: Study
    path: str
    root: Path
    extra: Overrides
    bases: Bases
    classifiers: "Classifiers"
    workers: int
    start: Callable[[int], Any]

    def jobs(self, runs: Mapping[str, Overrides]) -> list[Job]:
        """Returns the jobs of runs."""
        return _jobs(self.study, runs, self.root, self.extra, self.classifiers, self.bases)

    def check(self, runs: Mapping[str, Overrides]) -> list[Job]:
        """Checks the runs and what measures them; returns the jobs of the feature classifiers."""
        jobs, features = self.jobs(runs), _feature_jobs(self.classifiers)
        for name, overrides in runs.items():
            _validate(self.study, name, {**self.extra, **overrides})
        _validate_evaluators(self.study, jobs, runs)
        return features

    def train(
        self, runs: Mapping[str, Overrides], first: Mapping[str, Overrides], features: Sequence[Job]
    ) -> tuple[int | None, dict[str, str]]:
        """Trains the classifiers, then the runs that tune, then the others with what these chose.

        Returns:
            The signal that stopped it (or None), and the reason of each job that failed.
        """
        self._claim(first or runs, first or runs)
        if features:
            stopped, failed = pool.run(features, self.workers, self.start, "feature classifiers")
            if failed:
                print(f"{self.study.name}: no run was started, since a feature classifier measures each")
            if stopped is not None or failed:
                return stopped, failed
        if first:
            stopped, _ = pool.run(self.jobs(first), self.workers, self.start, f"{self.study.name}: tuning")
            if stopped is not None:
                return stopped, {}
            runs = _tuned(self.study, runs, first, self.root)
            self._claim(runs, {**first, **runs})
        return pool.run(self.jobs(runs), self.workers, self.start, self.study.name)

    def _claim(self, begun: Mapping[str, Overrides], runs: Mapping[str, Overrides]) -> None:
        """Writes study.json with the runs, if the folders of those that begin now hold no others."""
        refuse_other_configs(self.jobs(begun), begun, self.extra)
        claim(self.study, runs, self.path, self.root, self.extra, self.bases)


def load_config(source: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a run's whole config as plain dicts."""
    # Imported late, since checking a config loads the models, and with them jax.
    from scaling.training.config import load_dict

    return load_dict(source, overrides)


def count_gmacs(source: str, overrides: Mapping[str, Any]) -> float:
    """Returns the gmacs of a config, for which its model is traced."""
    from scaling.training.count import count

    return float(count(source, overrides)["gmacs"])


# --- tuning --------------------------------------------------------------------------------------


def _tuning_runs(study: Study, runs: Mapping[str, Overrides], extra: Overrides) -> dict[str, Overrides]:
    """Returns the runs that tune, by name; none where the study tunes nothing."""
    if study.tune is None:
        return {}
    costs = [(o, count_gmacs(study.config_of(o), {**extra, **o})) for o in _first_seeds(runs)]
    first = study.tune.runs(costs)
    return dict(zip(run_names(first), first, strict=True))


def _first_seeds(runs: Mapping[str, Overrides]) -> list[Overrides]:
    """Returns one run of each configuration."""
    of_point: dict[str, Overrides] = {}
    for overrides in runs.values():
        of_point.setdefault(json.dumps(without_seed(overrides), sort_keys=True), overrides)
    return list(of_point.values())


def _tuned(
    study: Study, runs: Mapping[str, Overrides], first: Mapping[str, Overrides], root: Path
) -> dict[str, Overrides]:
    """Returns the study's runs with the value that tuning chose; those that tuning made already are left out.

    Raises:
        UserError: if no value was measured in every configuration.
    """
    from scaling.study.results import last_values

    tune = study.tune
    assert tune is not None
    value = tune.chosen(last_values(study, first, root), first)
    print(f"{study.name}: {tune.key}={value!r}, the best of {', '.join(map(repr, tune.values))} ({tune.at})")
    carried = {name: {**overrides, tune.key: value} for name, overrides in runs.items()}
    return {name: overrides for name, overrides in carried.items() if overrides not in first.values()}


# --- what is to be run ---------------------------------------------------------------------------


def _validate(study: Study, name: str, overrides: Mapping[str, Any]) -> None:
    try:
        load_config(study.config_of(overrides), overrides)
    except UserError as e:
        raise UserError(f"study {study.name}, run {name}: {e}") from e


def _validate_evaluators(study: Study, jobs: Sequence[Job], runs: Mapping[str, Overrides]) -> None:
    """Checks the evaluators, and that one of them measures the study's metric, before anything is trained.

    Runs that differ only in what no metric's name depends on are checked once.

    Raises:
        UserError: naming the run, and the metrics that there are.
    """
    checked: set[str] = set()
    for job in jobs:
        different = {key: value for key, value in runs[job.name].items() if key.startswith(NAMING)}
        kind = f"{job.config} {sorted(different.items())}"
        if kind in checked or job.done():
            continue
        checked.add(kind)
        try:
            metrics = check_evaluators(job.config, job.flags)
        except UserError as e:
            raise UserError(f"study {study.name}, run {job.name}: {e}") from e
        if study.measure.name not in metrics:
            there = ", ".join(metrics) or "none, as the config has no evaluators that measure"
            raise UserError(
                f"study {study.name}, metric={study.measure.name!r}: run {job.name} has no such metric; "
                f"there are {there}"
            )


def check_evaluators(source: str, flags: Sequence[str]) -> tuple[str, ...]:
    """Has a run's evaluators check it, and returns their metrics.

    It happens on this process's CPU: the accelerators are for the runs.
    """
    import jax

    from scaling.training.config import load as load_run
    from scaling.training.evaluate import metric_names

    jax.config.update("jax_platforms", "cpu")
    return metric_names(load_run(source, flags))


# Sections on which it depends whether a run can be measured, and what the metrics are called.
NAMING = ("data.", "evaluators.", "model.name", "objective.")
# (source of a base config, evaluator) -> (config, folder) of its feature classifier
Classifiers = dict[tuple[str, str], tuple[str, Path]]


def _classifiers(study: Study, root: Path, extra: Mapping[str, Any], bases: Bases) -> Classifiers:
    """Returns the feature classifiers that the study trains for its runs.

    Evaluators with the same classifier config share the folder of the first. Where the command line or the
    sweep gives an evaluator its `classifier`, that one is used.
    """
    overridden = {*extra, *(key for overrides in study.sweep for key in overrides)}
    classifiers: Classifiers = {}
    folders: dict[str, Path] = {}  # by classifier config
    for source, base in bases.items():
        for name, options in base.get("evaluators", {}).items():
            config = options.get("classifier_config")
            if config and f"evaluators.{name}.classifier" not in overridden:
                taken = any(folder.name == name for folder in folders.values())
                new = root / "features" / (f"{name}_{len(folders)}" if taken else name)
                classifiers[source, name] = (config, folders.setdefault(config, new))
    return classifiers


def _feature_jobs(classifiers: Classifiers) -> list[Job]:
    configs = {folder: config for config, folder in classifiers.values()}
    for config in configs.values():
        load_config(config, {})
    return [Job(folder.name, folder, config, []) for folder, config in configs.items()]


def _named_as_stored(study: Study, root: Path) -> dict[str, Overrides]:
    """Returns the study's runs by the names of their folders, which an older study.json may say.

    A run's name comes from its swept keys, so a key that has another name today would begin the run again.
    """
    runs = (stored(root) or {}).get("runs", {})
    names = {json.dumps(renamed(overrides), sort_keys=True): name for name, overrides in runs.items()}
    return {
        names.get(json.dumps(overrides, sort_keys=True), name): overrides
        for name, overrides in study.runs().items()
    }


def _jobs(
    study: Study,
    runs: Mapping[str, Overrides],
    root: Path,
    extra: Mapping[str, Any],
    classifiers: Classifiers,
    bases: Bases,
) -> list[Job]:
    for key in extra:
        if any(key in overrides for overrides in runs.values()):
            raise UserError(f"{FLAG}{key}: is swept by study {study.name}; change its study file instead")
    jobs = []
    for name, overrides in runs.items():
        base = study.config_of(overrides)
        features = {
            f"evaluators.{evaluator}.classifier": str(folder)
            for (source, evaluator), (_, folder) in classifiers.items()
            if source == base
        }
        flags = override_flags({**extra, **overrides, **features})
        jobs.append(Job(name, root / "runs" / name, base, flags, _measured(bases[base])))
    return jobs


def _measured(base: Mapping[str, Any]) -> frozenset[str]:
    """Returns the names of the evaluators that measure a run while it is trained."""
    evaluators = base.get("evaluators", {}).items()
    return frozenset(name for name, options in evaluators if options.get("in_training", True))


def _environment(root: Path) -> dict[str, str]:
    """Returns the environment of the runs, with a compilation cache that all share.

    Runs that differ only in traced values (the seed, rates) then compile their steps once.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**cache, **os.environ}


# --- how it ended --------------------------------------------------------------------------------


def write_report(root: Path) -> None:
    """Writes the report on the runs that there are, complete or not, and prints its table."""
    from scaling.study.report import report, summary_table

    page = report(root)
    print(f"{summary_table(root)}\nreport: {page}")


def _exit_code(stopped: int | None, failed: Mapping[str, str], command: str) -> int:
    """Prints how the sweep ended, and returns its exit code."""
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    if stopped is not None:
        print(f"stopped by {signal.Signals(stopped).name}; resume with: {command}")
        return 128 + stopped
    if failed:
        print(f"{len(failed)} failed; when the cause is mended, resume with: {command}")
    return 1 if failed else 0


def _command(study: str, workdir: Path | str, workers: int, extra: Sequence[str]) -> list[str]:
    flags = [f"{FLAG}{text.removeprefix(FLAG)}" for text in extra]
    return [
        "scaling",
        "sweep",
        study,
        "--workdir",
        str(workdir),
        *(["--workers", str(workers)] * (workers > 1)),
        *flags,
    ]
