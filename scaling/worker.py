"""`python -m scaling.worker`: trains one run after the other, keeping imports and what is compiled.

A sweep writes it jobs as lines of JSON, {"arguments": [...], "log": path}. Each runs as `scaling ARGUMENTS`
would, with its output at the end of the log, and is answered by an empty line when it has ended well. One
that has not ends the process, with the exit code that the command would have.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable

from scaling import cli


def serve(command: Callable[[list[str]], int]) -> int:
    """Runs `command` with the arguments of each job; returns the exit code of the first that is not 0.

    It returns 0 when the sweep has ended.
    """
    jobs, answers = os.fdopen(os.dup(0)), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # what a run starts must not read its jobs
    for line in jobs:
        job = json.loads(line)
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = command(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            return code
        gc.collect()  # arrays in circles would fill the device's memory
        with contextlib.suppress(BrokenPipeError):  # the sweep was killed, and there is no other job
            os.write(answers, b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(serve(cli.main))
