"""Starts a study's runs and keeps what is done: `scaling sweep STUDY --workdir W`."""

import ast
import contextlib
import fcntl
import os
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.files import read_json, write_json
from scaling.study import workers as pool
from scaling.study.sweep import Study, load
from scaling.study.workers import Job

# Where a run is computed, not what: these may change between one start of a study and the next.
MACHINE_SECTIONS = ("mesh",)


def sweep(
    study_path: Path | str, workdir: Path | str, workers: int = 1, extra_overrides: Sequence[str] = ()
) -> int:
    """Runs a study to its end, then writes its report. The same command resumes it.

    Done runs are kept, broken and interrupted ones resumed; failed ones are listed with their reasons
    when all others have ended.

    Args:
        study_path: a folder with a `study.py`, or a Python file with `STUDY`.
        workdir: the study folder.
        workers: runs at a time; the machine's cores are split between them.
        extra_overrides: `["train.duration=100 steps", ...]` for every run (`--config.` in front is fine).

    Returns:
        The exit code: 0 if every run is done, 1 if any failed, 128 + the signal's number if one stopped it.

    Raises:
        UserError: before anything is started, if the study, an override or the folder is wrong.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    study, root = load(study_path), Path(workdir).absolute()
    extra = _parsed(extra_overrides)
    bases = {source: load_config(source, extra) for source in map(study.config_of, study.sweep)}
    classifiers = _classifiers(study, root, extra, bases)
    jobs, features = _jobs(study, root, extra, classifiers), _feature_jobs(classifiers)
    for name, overrides in study.runs().items():
        _validated(study, name, {**extra, **overrides})
    with _locked(root):
        _refuse_other_configs(jobs, study, extra)
        _claim(study, str(study_path), root, extra, bases)
        env = _environment(root)
        stopped, failed = pool.run(features, workers, env, "feature classifiers") if features else (None, {})
        if stopped is None and not failed:
            stopped, failed = pool.run(jobs, workers, env, study.name)
        elif failed:
            print(f"{study.name}: no run was started, since every run is measured by a feature classifier")
        if stopped is None:
            write_report(root)
    return _outcome(stopped, failed, shlex.join(_command(str(study_path), workdir, workers, extra_overrides)))


def load_config(source: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A run's whole config as plain dicts. Imported late: checking a config loads the models."""
    from scaling.engine.config import load_dict

    return load_dict(source, overrides)


# --- what is to be run ---------------------------------------------------------------------------


def _parsed(texts: Sequence[str]) -> dict[str, Any]:
    """`["--config.a.b=1"]` as {"a.b": 1}; what is no Python literal is a string."""
    parsed: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"override {text!r}: must be of the form --config.KEY=VALUE")
        parsed[key] = _literal(value)
    return parsed


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _flags(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as they are typed: a string that would be read as something else is quoted."""
    return [
        f"--config.{key}={value if isinstance(value, str) and _literal(value) == value else repr(value)}"
        for key, value in overrides.items()
    ]


def _validated(study: Study, name: str, overrides: Mapping[str, Any]) -> None:
    try:
        load_config(study.config_of(overrides), overrides)
    except UserError as e:
        raise UserError(f"study {study.name}, run {name}: {e}") from e


Bases = Mapping[str, Mapping[str, Any]]  # the whole config of each base config's source
Classifiers = dict[
    tuple[str, str], tuple[str, Path]
]  # (base, evaluator) -> its classifier's (config, folder)


def _classifiers(study: Study, root: Path, extra: Mapping[str, Any], bases: Bases) -> Classifiers:
    """The feature classifiers that the study makes for its runs.

    Evaluators of one classifier config share the first one's folder. Where the command line or the sweep
    gives an evaluator its `classifier`, that one is used.
    """
    given = {*extra, *(key for overrides in study.sweep for key in overrides)}
    found: Classifiers = {}
    folders: dict[str, Path] = {}
    for source, base in bases.items():
        for name, options in base.get("evaluate", {}).items():
            config = options.get("classifier_config")
            if config and f"evaluate.{name}.classifier" not in given:
                taken = any(folder.name == name for folder in folders.values())
                own = root / "features" / (f"{name}_{len(folders)}" if taken else name)
                found[source, name] = (config, folders.setdefault(config, own))
    return found


def _feature_jobs(classifiers: Classifiers) -> list[Job]:
    made = {folder: config for config, folder in classifiers.values()}
    for config in made.values():
        load_config(config, {})
    return [Job(folder.name, folder, config, []) for folder, config in made.items()]


def _jobs(study: Study, root: Path, extra: Mapping[str, Any], classifiers: Classifiers) -> list[Job]:
    runs = study.runs()
    for key in extra:
        if any(key in overrides for overrides in runs.values()):
            raise UserError(f"--config.{key}: is swept by study {study.name}; change its study file instead")
    jobs = []
    for name, overrides in runs.items():
        own = study.config_of(overrides)
        features = {
            f"evaluate.{evaluator}.classifier": str(folder)
            for (source, evaluator), (_, folder) in classifiers.items()
            if source == own
        }
        jobs.append(Job(name, root / "runs" / name, own, _flags({**extra, **overrides, **features})))
    return jobs


def _environment(root: Path) -> dict[str, str]:
    """Runs that differ only in traced values (the seed, rates) share compiled steps through a cache."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**cache, **os.environ}


# --- whose folder it is --------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One sweep at a time; the lock dies with its process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("a+")
    except OSError as e:
        raise UserError(f"workdir={root}: cannot be written ({e.strerror}); choose another folder") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"workdir={root}: another sweep (process {lock.read().strip()}) writes here; wait or stop it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _claim(study: Study, path: str, root: Path, extra: Mapping[str, Any], bases: Bases) -> None:
    """Writes study.json, unless the folder belongs to another study; another sweep is the same study."""
    kept = {
        source: {k: v for k, v in base.items() if k not in MACHINE_SECTIONS} for source, base in bases.items()
    }
    given = _flat(kept[study.config] if isinstance(study.config, str) else kept)
    old = read_json(root / "study.json")
    if old and (differs := _difference(old, {"metric": study.metric, "base": given})):
        raise UserError(f"workdir={root}: holds another study ({differs}); choose another folder")
    described = {
        "name": study.name, "title": study.title, "question": study.question,
        "metric": study.metric, "lower_is_better": study.lower_is_better,
        "study": path, "config": ", ".join(bases), "overrides": dict(extra), "base": given,
        "runs": study.runs(),
    }  # fmt: skip
    write_json(root / "study.json", described)


def _refuse_other_configs(jobs: Sequence[Job], study: Study, extra: Mapping[str, Any]) -> None:
    """A run folder of other overrides is never overwritten, and never passed off as this run."""
    for job, overrides in zip(jobs, study.runs().values(), strict=True):
        stored = _flat((read_json(job.folder / "config.json") or {}).get("config", {}))
        for key, value in _flat({**extra, **overrides}).items():
            if key.split(".")[0] not in MACHINE_SECTIONS and stored.get(key, value) != value:
                raise UserError(
                    f"{job.folder}: was run with {key}={stored[key]!r}, not {value!r}; move it away"
                )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": (1,)}} as {"a.b": [1]}: dotted names, and sequences as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _listed(value)
    return flat


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first value of `new` that `old` does not have, in words."""
    before, after = _flat(old), _flat(new)
    for key in [*after, *(k for k in before if k.startswith("base."))]:
        if before.get(key) != after.get(key):
            return f"{key.removeprefix('base.')}={before.get(key)!r}, not {after.get(key)!r}"
    return None


# --- how it ended --------------------------------------------------------------------------------


def write_report(root: Path) -> None:
    """Writes the report on what there is, complete or not, and prints its table."""
    from scaling.study.report import report, summary_table

    page = report(root)
    print(f"{summary_table(root)}\nreport: {page}")


def _outcome(stopped: int | None, failed: Mapping[str, str], command: str) -> int:
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")
    if stopped is not None:
        print(f"stopped by {signal.Signals(stopped).name}; resume with: {command}")
        return 128 + stopped
    if failed:
        print(f"{len(failed)} failed; when the cause is mended, resume with: {command}")
    return 1 if failed else 0


def _command(study: str, workdir: Path | str, workers: int, extra: Sequence[str]) -> list[str]:
    flags = [f"--config.{text.removeprefix('--config.')}" for text in extra]
    return [
        "scaling",
        "sweep",
        study,
        "--workdir",
        str(workdir),
        *(["--workers", str(workers)] * (workers > 1)),
        *flags,
    ]
