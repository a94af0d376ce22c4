"""`scaling sweep STUDY --workdir W`: starts a study's runs, and keeps those that are done."""

import contextlib
import functools
import json
import os
import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.files import open_locked, write_json
from scaling.former_names import renamed
from scaling.overrides import FLAG, flat, override_flags, parse_overrides
from scaling.run.folder import MAY_DIFFER, RunFolder, read_description
from scaling.study import pool
from scaling.study.jobs import Job
from scaling.study.launchers import LAUNCHERS
from scaling.study.sweep import Overrides, Study, load, stored


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
    classifiers = _classifiers(study, root, extra, bases)
    runs = _named_as_stored(study, root)
    jobs, features = _jobs(study, runs, root, extra, classifiers, bases), _feature_jobs(classifiers)
    for name, overrides in runs.items():
        _validate(study, name, {**extra, **overrides})
    _validate_evaluators(study, jobs, runs)
    with _locked(root):
        _refuse_other_configs(jobs, runs, extra)
        _claim(study, runs, str(study_path), root, extra, bases)
        start = functools.partial(LAUNCHERS[launcher], _environment(root))
        stopped, failed = (
            pool.run(features, workers, start, "feature classifiers") if features else (None, {})
        )
        if stopped is None and not failed:
            stopped, failed = pool.run(jobs, workers, start, study.name)
        elif failed:
            print(f"{study.name}: no run was started, since every run is measured by a feature classifier")
        if stopped is None:
            write_report(root)
    return _exit_code(
        stopped, failed, shlex.join(_command(str(study_path), workdir, workers, extra_overrides))
    )


def load_config(source: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a run's whole config as plain dicts."""
    # Imported late, since checking a config loads the models, and with them jax.
    from scaling.training.config import load_dict

    return load_dict(source, overrides)


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
Bases = Mapping[str, Mapping[str, Any]]  # source of a base config -> the whole config
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


# --- whose folder it is --------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which allows one sweep at a time and ends with its process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open_locked(root / "lock")
    except BlockingIOError:
        holder = (root / "lock").read_text().strip()
        raise UserError(
            f"workdir={root}: another sweep (process {holder}) writes here; wait or stop it"
        ) from None
    except OSError as e:
        raise UserError(f"workdir={root}: cannot be written ({e.strerror}); choose another folder") from e
    with lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _claim(
    study: Study,
    runs: Mapping[str, Overrides],
    path: str,
    root: Path,
    extra: Mapping[str, Any],
    bases: Bases,
) -> None:
    """Writes study.json, unless the folder belongs to another study, of which a run has begun.

    Another sweep is the same study, and so are other evaluators or another mesh.
    """
    base = flat(bases[study.config] if isinstance(study.config, str) else bases)
    old = stored(root)
    if old is not None and any(RunFolder(root / "runs" / name).saved() is not None for name in old["runs"]):
        old = {"metric": old["metric"]["name"], "base": _in_current_names(old["base"], bases)}
        if differs := _difference(old, {"metric": study.measure.name, "base": base}, bases):
            raise UserError(f"workdir={root}: holds another study ({differs}); choose another folder")
    write_json(root / "study.json", {**study.as_json(path, dict(extra), base), "runs": dict(runs)})


def _in_current_names(base: Mapping[str, Any], sources: Iterable[str]) -> dict[str, Any]:
    """Returns a stored base with today's dotted keys; those of several configs begin with their sources."""
    current: dict[str, Any] = {}
    for key, value in base.items():
        source = next((f"{source}." for source in sources if key.startswith(f"{source}.")), "")
        values = renamed({key.removeprefix(source): value})
        current |= {f"{source}{name}": new for name, new in values.items()}
    return current


def _refuse_other_configs(
    jobs: Sequence[Job], runs: Mapping[str, Overrides], extra: Mapping[str, Any]
) -> None:
    """Checks that no job's folder holds a run of other overrides, which would pass for the job's own.

    Raises:
        UserError: naming the first folder that does, and the value.
    """
    for job, overrides in zip(jobs, runs.values(), strict=True):
        if RunFolder(job.folder).saved() is None:
            continue  # has not begun
        config = flat(renamed((read_description(job.folder) or {}).get("config", {})))
        for key, value in flat({**extra, **overrides}).items():
            if not key.startswith(MAY_DIFFER) and config.get(key, value) != value:
                raise UserError(
                    f"{job.folder}: was run with {key}={config[key]!r}, not {value!r}; move it away"
                )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], sources: Iterable[str]) -> str | None:
    """Returns the first value of `new` that `old` does not have, in words.

    A value that may differ when a run is resumed may differ here, too.
    """
    before, after = flat(old), flat(new)
    free = tuple(f"base.{source}{key}" for source in ("", *(f"{s}." for s in sources)) for key in MAY_DIFFER)
    for key in [*after, *(k for k in before if k.startswith("base."))]:
        if before.get(key) != after.get(key) and not key.startswith(free):
            return f"{key.removeprefix('base.')}={before.get(key)!r}, not {after.get(key)!r}"
    return None


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
