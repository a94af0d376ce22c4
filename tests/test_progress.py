"""Progress: lines now and then where there is no terminal, and a bar where there is one."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from scaling import progress

SCRIPT = """
from scaling.progress import track
for _ in track(range(50), "plans", 50, "plan"):
    pass
"""


class Clock:
    """A clock that is turned by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with progress.Progress("run", 100, examples=16) as bar:
        bar.say("compiling the step")
        for step in range(1, 101):
            bar.update(step, "loss 0.5", last=step == 100)
            clock.now += 1.0
    said = capsys.readouterr()
    assert said.out == "run: compiling the step\n"
    assert said.err.splitlines() == [
        "run: step 32/100, loss 0.5, 16 examples/s, 68 s left",
        "run: step 63/100, loss 0.5, 16 examples/s, 37 s left",
        "run: step 94/100, loss 0.5, 16 examples/s, 6 s left",
        "run: step 100/100, loss 0.5, 16 examples/s, 0 s left",
    ]


def test_it_is_silent_where_another_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("run", 1, show=False) as bar:
        bar.say("compiling the step")
        bar.update(1, last=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("term", "bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_has_a_bar(term: str, bar: bool) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    env = {**os.environ, "TERM": term}
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=slave, env=env, check=True, timeout=60)
    os.close(slave)
    said = b""
    try:
        while chunk := os.read(master, 4096):
            said += chunk
    except OSError:  # all of it was read
        pass
    os.close(master)
    assert (b"plans: 100%" in said and b"50/50" in said) == bar and bool(said) == bar
