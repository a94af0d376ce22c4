"""Whose a study folder is: one sweep at a time, of one study, whose runs are of its overrides."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.files import open_locked, write_json
from scaling.former_names import renamed
from scaling.overrides import flat
from scaling.run.folder import MAY_DIFFER, RunFolder, read_description
from scaling.study.jobs import Job
from scaling.study.sweep import Overrides, Study, stored

Bases = Mapping[str, Mapping[str, Any]]  # source of a base config -> the whole config


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the folder's lock, which allows one sweep at a time and ends with its process.

    Raises:
        UserError: if another sweep holds it, or the folder cannot be written.
    """
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


def claim(
    study: Study,
    runs: Mapping[str, Overrides],
    path: str,
    root: Path,
    extra: Mapping[str, Any],
    bases: Bases,
) -> None:
    """Writes study.json, unless the folder belongs to another study, of which a run has begun.

    Another sweep is the same study, and so are other evaluators or another mesh.

    Raises:
        UserError: if it does.
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


def refuse_other_configs(
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
