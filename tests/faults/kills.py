"""Kills: verbs are ended at drawn moments, most of them around writes, and the same command is run again.

In the end the result is that of an unbroken run, bit by bit; nothing temporary is left, and no process.
"""

import os
import random
import shutil
import signal
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from scaling.run.folder import read_status
from tests.faults.harness import LATE, Case, Outcome, finish, start_verb, wait_until
from tests.faults.runs import (
    WORKS,
    Kill,
    hook_env,
    processes_with,
    shared_memory,
    temporaries,
    unbroken,
    whose_of,
)

KILLS = 3  # in a case, one after the other, before the command may end
CASES = {"train": 14, "train with workers": 8, "sweep": 8, "encode": 8, "import": 6}
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS = 180.0  # that a verb may take to end


def cases() -> Iterator[Case]:
    """Yields the cases, in turns of the verbs."""
    rng = random.Random(0)
    turns = [(work, turn) for work, count in CASES.items() for turn in range(count)]
    for work, turn in sorted(turns, key=lambda each: (each[1] / CASES[each[0]], each[0])):
        kills = [_draw(rng, work) for _ in range(KILLS)]
        name = ", ".join(f"{k.signum.name} at {k.share:.2f}{' of the time' * k.timed}" for k in kills)
        yield Case(f"{work} {turn}: {name}", partial(_try, work, kills))


def _draw(rng: random.Random, work: str) -> Kill:
    """Draws a kill, three of four of them where a file is touched."""
    delay = rng.choice((0.0, 0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
    signum, whose = rng.choice(SIGNALS), rng.choice(whose_of(work))
    return Kill(rng.random(), rng.random() < 0.25, delay, signum, whose)


# --- a case ---


def _try(work: str, kills: list[Kill], folder: Path) -> Outcome:
    out, mark = folder / "out", f"FAULTS_CASE={uuid.uuid4()}"
    expected, shared, landed, less = unbroken(work), shared_memory(), 0, 1.0
    for kill in kills:
        if less == 1.0:
            shutil.rmtree(out, ignore_errors=True)  # it had ended before it was killed
        code, said = _run(work, out, mark, kill, less)
        landed += code != 0
        less = 0.6 * less if code != 0 else 1.0  # less is left to do
        if "Traceback" in said and code != -signal.SIGKILL:  # loaders of one that was may say so at length
            return Outcome("traceback", f"{kill}: {said[-600:]}")
        if code == LATE:
            return Outcome("hang", f"{kill}: {said[-300:]}")
        failed = 1 if "worker" in kill.whose else 0  # the sweep says that a run has failed
        if code not in (0, failed, -kill.signum, 128 + kill.signum):
            return Outcome("unclear", f"{kill}: exit {code}: {said[-300:]}")
        if work != "sweep" and not wait_until(lambda: not processes_with(mark), 15):
            return Outcome("differs", f"{kill}: processes are left: {_end(mark)}")
    code, said = _run(work, out, mark)
    if code != 0 and not (work == "import" and _is_whole(out)):
        return Outcome("unclear", f"run again: exit {code}: {said[-500:]}")
    if (digest := WORKS[work].digest(out)) != expected.digest:
        return Outcome("differs", f"{digest}, not {expected.digest}")
    if left := temporaries(out):
        return Outcome("differs", f"temporary files are left: {left}")
    if not wait_until(lambda: not processes_with(mark), 15):
        return Outcome("differs", f"processes are left: {_end(mark)}")
    if not wait_until(lambda: not shared_memory() - shared, 15):
        return Outcome("differs", f"shared memory is left: {shared_memory() - shared}")
    return Outcome("fine", f"{landed} kills")


def _run(work: str, out: Path, mark: str, kill: Kill | None = None, less: float = 1.0) -> tuple[int, str]:
    """Runs a command, killed on its way or not; returns its exit code, `LATE` if it hangs, and output."""
    env, whole = dict([mark.split("=")]), unbroken(work)
    if kill is not None and not kill.timed:
        place = 1 + int(kill.share * less * whole.places[kill.whose])
        env |= hook_env(out, place, kill.delay, kill.signum, kill.whose)
    process = start_verb(WORKS[work].words(out), env)
    if kill is not None and kill.timed:
        wait_until(lambda: process.poll() is not None, 0.8 * kill.share * whole.seconds)
        if kill.signum != signal.SIGKILL:  # it is asked to end only once it can hear
            wait_until(lambda: process.poll() is not None or _hears(process.pid, kill.signum), SECONDS)
        process.send_signal(kill.signum)
    return finish(process, SECONDS)


def _hears(pid: int, signum: int) -> bool:
    """Returns whether a process catches SIGHUP, the last that it comes to catch, and this signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True  # it has ended
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGHUP - 1) & 1 and caught >> (signum - 1) & 1)


def _is_whole(out: Path) -> bool:
    """Returns whether an import was complete already, which is not written over."""
    return (read_status(out) or {}).get("status") == "done"


def _end(mark: str) -> list[str]:
    """Ends the processes that a case has left; returns what they were."""
    left = []
    for pid in processes_with(mark):
        try:
            left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[-120:])
            os.kill(pid, signal.SIGKILL)
        except OSError:  # it has ended
            pass
    return left
