"""Faults: what may go wrong with a verb, tried case by case and judged (`python -m tests.faults`).

A part is a module of this folder with `cases()`, which yields the same cases in the same order every time.
"""

import contextlib
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling import cli

ROOT = Path(__file__).parents[2]
PARTS = ("kills", "damage", "input", "limits")
Kind = Literal["clear", "fine", "silent", "unclear", "traceback", "hang", "differs"]
KINDS: tuple[Kind, ...] = ("clear", "fine", "silent", "unclear", "traceback", "hang", "differs")
FAULTS = KINDS[2:]
LATE = 124  # exit code of a verb that did not end in time, as of timeout(1)
LONGEST = 600  # characters of an error that is still read


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    "clear" is an error of one line, and "fine" a success that was due. Faults are: bad input that is accepted
    ("silent"), an error that does not help ("unclear"), a traceback, a verb that does not end ("hang"), and
    a result of other bits ("differs").
    """

    kind: Kind
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """One fault to try, in an empty folder of its own."""

    name: str
    run: Callable[[Path], Outcome]


def cases_of(part: str) -> Iterator[Case]:
    """Yields the cases of a part, "kills", "damage", "input" or "limits"."""
    yield from importlib.import_module(f"tests.faults.{part}").cases()


def try_case(case: Case, folder: Path) -> Outcome:
    """Tries a case; what the case itself raises is a traceback."""
    folder.mkdir(parents=True)
    try:
        return case.run(folder)
    except Exception:
        return Outcome("traceback", traceback.format_exc()[-LONGEST:])


# --- verbs ---


def run_verb(
    words: Sequence[str], seconds: float = 120.0, env: dict[str, str] | None = None, **options: Any
) -> Outcome:
    """Runs a verb on bad input, in a process of its own on one device, and judges how it ends."""
    return judge(*finish(start_verb(words, env, **options), seconds))


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Waits for a verb; returns its exit code, `LATE` if it does not end in time, and all that it said."""
    try:
        said, code = process.communicate(timeout=seconds), process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        said, code = process.communicate(), LATE
    return code, "".join(filter(None, said))


def start_verb(
    words: Sequence[str], env: Mapping[str, str | None] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Starts a verb in a process of its own on one device, without the variables that `env` has as None."""
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ.get("XLA_FLAGS", ""))
    variables = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **(env or {})}
    there = {key: value for key, value in variables.items() if value is not None}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen(
        [sys.executable, "-m", "scaling", *words], env=there, cwd=ROOT, text=True, **pipes
    )


def run_verb_here(words: Sequence[str], seconds: int = 60) -> Outcome:
    """Runs a verb on bad input in this process, and judges how it ends, as `run_verb` does."""
    code, _, said = call_here(words, seconds)
    return judge(code, said)


def call_here(words: Sequence[str], seconds: int = 60) -> tuple[int, str, str]:
    """Runs a verb in this process; returns its exit code, its output, and its output among its errors.

    The code is 124 if it did not end in time.
    """
    out, said = io.StringIO(), io.StringIO()

    class _Both(io.StringIO):
        def write(self, text: str) -> int:
            out.write(text)
            return said.write(text)

    def _late(signum: int, frame: Any) -> None:
        raise TimeoutError

    logged = logging.StreamHandler(said)  # what was imported before may have bound the log to the real stderr
    logging.getLogger("scaling").addHandler(logged)
    previous = signal.signal(signal.SIGALRM, _late)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(_Both()), contextlib.redirect_stderr(said):
            code = cli.main(list(words))
    except SystemExit as e:
        code = int(e.code or 0)
    except TimeoutError:
        code = LATE
    except BaseException:
        code = 1
        said.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        logging.getLogger("scaling").removeHandler(logged)
    return code, out.getvalue(), said.getvalue()


def judge(code: int, said: str) -> Outcome:
    """Judges the answer of a verb to bad input, by its exit code and what it printed.

    Clear is exit code 2, and as the last line an error of at most `LONGEST` characters.
    """
    lines = [line for line in said.splitlines() if line.strip()]
    if code == LATE:
        return Outcome("hang", said[-LONGEST:])
    if "Traceback (most recent call last)" in said:
        return Outcome("traceback", said[-LONGEST:])
    if code == 0:
        return Outcome("silent", lines[-1] if lines else "")
    last = lines[-1] if lines else ""
    errors = sum("error: " in line for line in lines)
    if code == 2 and errors == 1 and "error: " in last and len(last) <= LONGEST:
        return Outcome("clear", last)
    return Outcome("unclear", f"exit {code}: {said[-LONGEST:]}")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition holds, for at most so many seconds; returns whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
