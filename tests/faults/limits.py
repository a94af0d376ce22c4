"""Limits: full disks, few files, folders that cannot be written, streams that are closed, a bare environment.

A verb goes on, or it ends in one line, and without the limit the same command then makes the same bits.
"""

import ctypes
import itertools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.harness import Case, Outcome, finish, judge, start_verb, wait_until
from tests.faults.runs import WORKS, inputs, temporaries, unbroken

SECONDS = 120.0  # that a verb may take to end
FILE_SIZES = (0, 300, 1500, 2600, 5000, 11000, 20000, 40000, 100000)  # bytes
OPEN_FILES = (20, 24, 40, 80, 120)
DISKS = (40, 150, 300, 500, 800)  # KiB
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "a HOME that does not exist": {"HOME": "/nowhere"},
    "TERM=dumb": {"TERM": "dumb"},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no PATH": {"PATH": ""},
}
READ_ONLY = (".", "checkpoints", "tensorboard", "samples")  # in a run's folder
DROP_CAPABILITY, OVERRIDES = 24, (1, 2)  # prctl's PR_CAPBSET_DROP, and those by which root writes anywhere


def cases() -> Iterator[Case]:
    """Yields the cases, in turns of the kinds of limits."""
    kinds = (
        _file_sizes(), _descriptors(), _disks(), _read_only(), _streams(), _environments(), _open_files(),
        _answers(), _twice(),
    )  # fmt: skip
    for turn in itertools.zip_longest(*kinds):
        yield from filter(None, turn)


def _file_sizes() -> Iterator[Case]:
    for size, work in itertools.product(FILE_SIZES, ("train", "encode", "import")):
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        yield Case(f"{work}: files of {size} bytes at most", partial(_try, work, before=limit))


def _open_files() -> Iterator[Case]:
    for count, work in itertools.product(OPEN_FILES, ("train", "train with workers", "encode")):
        limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (count, count))
        yield Case(f"{work}: {count} open files at most", partial(_try, work, before=limit))


def _descriptors() -> Iterator[Case]:
    every = [c for count in (1, 2, 3) for c in itertools.combinations((0, 1, 2), count)]
    for work, combinations in (("train", every), ("sweep", every[-1:]), ("encode", every[1:3])):
        for closed in combinations:
            before = partial(_close, closed)
            yield Case(f"{work}: without descriptors {closed}", partial(_goes_on, work, before=before))


def _streams() -> Iterator[Case]:
    both = list(itertools.product(("read", "unread", "full"), repeat=2))[1:]
    for work, streams in [("train", both), *((w, both[3::4]) for w in ("sweep", "encode", "import"))]:
        for out, err in streams:
            pipes = partial(_pipes, out, err)
            yield Case(f"{work}: stdout {out}, stderr {err}", partial(_goes_on, work, pipes=pipes))


def _environments() -> Iterator[Case]:
    for name, env in ENVIRONMENTS.items():
        yield Case(f"train: {name}", partial(_goes_on, "train", env=env))


def _disks() -> Iterator[Case]:
    for size, work in itertools.product(DISKS, ("train", "encode", "import")):
        yield Case(f"{work}: a disk of {size} KiB", partial(_on_disk, work, size))
    for size in DISKS[1::2]:
        yield Case(f"sweep: a disk of {size} KiB", partial(_on_disk, "sweep", size))


def _read_only() -> Iterator[Case]:
    for name in READ_ONLY:
        yield Case(f"train: {name} becomes read-only", partial(_becomes_read_only, name))
    for work in WORKS:
        yield Case(f"{work}: a folder that cannot be made", partial(_cannot_be_made, work))


def _answers() -> Iterator[Case]:
    for verb, out in itertools.product(("models", "evaluate", "report"), ("unread", "full")):
        yield Case(f"{verb}: stdout {out}", partial(_answer, verb, out))


def _twice() -> Iterator[Case]:
    for work in ("train", "sweep", "encode"):
        yield Case(f"{work}: two of one folder", partial(_two, work))


# --- how they are tried ---


def _try(work: str, folder: Path, **limits: Any) -> Outcome:
    """Runs a command under a limit, and without it if it ended in one line."""
    out = folder / "out"
    code, said = _run(WORKS[work].words(out), **limits)
    outcome = Outcome("fine") if code == 0 else judge(code, said)
    return _again(work, out, outcome) if outcome.kind in ("fine", "clear") else outcome


def _goes_on(work: str, folder: Path, **limits: Any) -> Outcome:
    """Runs a command under a limit that must not end it."""
    outcome = _try(work, folder, **limits)
    return Outcome("unclear", f"it ended: {outcome.detail}") if outcome.kind == "clear" else outcome


def _again(work: str, out: Path, outcome: Outcome) -> Outcome:
    """Runs a command that ended in one line again; returns the outcome if it makes what is due."""
    if outcome.kind == "clear":
        code, said = _run(WORKS[work].words(out))
        if code != 0:
            return Outcome("unclear", f"run again after {outcome.detail}: exit {code}: {said[-400:]}")
    if (digest := WORKS[work].digest(out)) != unbroken(work).digest:
        return Outcome("differs", f"{digest}, not {unbroken(work).digest}, after {outcome.detail}")
    if left := temporaries(out):
        return Outcome("differs", f"temporary files are left: {left}")
    return outcome


def _run(
    words: list[str],
    before: Callable[[], Any] | None = None,
    env: Mapping[str, str | None] | None = None,
    pipes: Callable[[], dict[str, Any]] = dict,
) -> tuple[int, str]:
    """Runs a verb; returns its exit code, `LATE` if it does not end, and what it said."""
    streams = pipes()
    process = start_verb(words, env, preexec_fn=before, **streams)
    for stream in streams.values():
        if stream not in (subprocess.PIPE, subprocess.STDOUT):
            os.close(stream)
    return finish(process, SECONDS)


def _close(descriptors: tuple[int, ...]) -> None:
    for fd in descriptors:
        os.close(fd)


def _pipes(out: str, err: str) -> dict[str, Any]:
    return {"stdout": _stream(out), "stderr": _stream(err)}


def _stream(kind: str) -> int:
    """Returns where a stream goes: a pipe that is read, one that nobody reads, or a full disk."""
    if kind == "read":
        return subprocess.PIPE
    if kind == "full":
        return os.open("/dev/full", os.O_WRONLY)
    read, write = os.pipe()
    os.close(read)
    return write


def _obey_modes() -> None:
    """Takes from a process, which runs as root, what would let it write into folders that are read-only."""
    if os.geteuid() == 0:
        for capability in OVERRIDES:
            ctypes.CDLL(None).prctl(DROP_CAPABILITY, capability, 0, 0, 0)


def _on_disk(work: str, size: int, folder: Path) -> Outcome:
    """Runs a command on a small file system of its own; what it made is then moved to a large one."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return Outcome("fine", "mounting a file system to fill needs root")
    try:
        code, said = _run(WORKS[work].words(disk / "out"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        outcome = Outcome("fine") if code == 0 else judge(code, said)
        if work == "sweep" and code == 1 and "Traceback" not in said:  # it lists the runs that failed
            outcome = Outcome("clear", said[-200:])
        return _again(work, disk / "out", outcome) if outcome.kind in ("fine", "clear") else outcome
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _becomes_read_only(name: str, folder: Path) -> Outcome:
    """Has a folder of a run become read-only once the first checkpoint is whole."""
    out = folder / "out"
    process = start_verb(WORKS["train"].words(out), preexec_fn=_obey_modes)
    wait_until(lambda: (out / "checkpoints/4").exists() or process.poll() is not None, SECONDS)
    (out / name).mkdir(exist_ok=True)
    (out / name).chmod(0o555)
    code, said = finish(process, SECONDS)
    (out / name).chmod(0o755)
    outcome = Outcome("fine") if code == 0 else judge(code, said)
    return _again("train", out, outcome) if outcome.kind in ("fine", "clear") else outcome


def _cannot_be_made(work: str, folder: Path) -> Outcome:
    folder.chmod(0o555)
    code, said = _run(WORKS[work].words(folder / "out"), before=_obey_modes)
    folder.chmod(0o755)
    return judge(code, said)


def _answer(verb: str, out: str, folder: Path) -> Outcome:
    """Runs a verb that prints what it was asked for: an unread pipe is no error, and a full disk is one."""
    unbroken("sweep")
    study = inputs() / "unbroken sweep -m scaling.worker"
    words = {
        "models": ["models", "--name=t5"],
        "evaluate": ["evaluate", str(next((study / "runs").iterdir()))],
        "report": ["report", str(study)],
    }
    code, said = _run(words[verb], pipes=lambda: {"stdout": _stream(out), "stderr": subprocess.PIPE})
    if out == "unread":
        return (
            Outcome("fine") if (code, said) == (0, "") else Outcome("unclear", f"exit {code}: {said[-300:]}")
        )
    return judge(code, said)


def _two(work: str, folder: Path) -> Outcome:
    """Starts a command twice: one goes on, and one says so in a line."""
    out = folder / "out"
    both = [start_verb(WORKS[work].words(out)) for _ in range(2)]
    ended = sorted((finish(process, SECONDS) for process in both), key=lambda each: each[0])
    if ended[0][0] != 0:
        return Outcome("unclear", f"exit {ended[0][0]}: {ended[0][1][-300:]}")
    if ended[1][0] == 0:  # it began when the other was done
        return _again(work, out, Outcome("fine"))
    return _again(work, out, judge(*ended[1]))
