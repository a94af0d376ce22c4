"""Standard streams that are closed, full or unread, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from scaling import streams
streams.secure()
print("out" * 5000)
print("err", file=sys.stderr)
assert [os.fstat(fd) for fd in range(3)] and sys.stdin is not None
opened = os.open("/dev/null", os.O_RDONLY)  # has no number of a standard stream
assert opened > 2
print(streams.lost() or "", file=open(sys.argv[1], "w"))
"""


def run(file: Path, redirect: str) -> tuple[int, str, str]:
    command = f'"{sys.executable}" -c "$SCRIPT" {file} {redirect}'
    env = {**os.environ, "SCRIPT": SCRIPT}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, file.read_text().strip()


@pytest.mark.parametrize(
    ("redirect", "lost"),
    [
        ("", ""),
        (">&-", ""),
        ("2>&-", ""),
        ("<&- >&- 2>&-", ""),
        ("<&-", ""),
        ("| true; exit ${PIPESTATUS[0]}", ""),
        (">/dev/full", "No space left on device"),
        (">/dev/full 2>/dev/full", "No space left on device"),
    ],
)
def test_writing_never_fails(redirect: str, lost: str, tmp_path: Path) -> None:
    code, err, reason = run(tmp_path / "lost", redirect)
    assert (code, reason) == (0, lost)
    assert err == ("" if "2>" in redirect else "err\n")


@pytest.mark.parametrize(
    ("redirect", "code", "said"), [("| head -1", 0, ""), (">/dev/full", 2, "error: stdout: ")]
)
def test_an_answer_that_cannot_be_printed(redirect: str, code: int, said: str) -> None:
    """Nobody who reads on is quiet; a full disk is an error, since the answer is nowhere else."""
    command = f'"{sys.executable}" -m scaling models --name=t5 {redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and done.stderr.startswith(said) and bool(done.stderr) == bool(said)
