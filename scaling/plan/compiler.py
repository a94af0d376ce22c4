"""A client of the process that compiles for hardware that is not here, `plan.compile`, and its requests."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

from scaling.errors import UserError
from scaling.plan import hardware


@dataclass(frozen=True)
class Request:
    """One program of a run, to be planned on one slice.

    Raises:
        UserError: if a number is below 1.
    """

    config: str
    topology: str
    overrides: Sequence[str] = ()
    what: str = "train"
    batch: int | None = None  # global batch size; None is the config's
    examples: int | None = None  # number in an epoch, where the data are not here
    side: int | None = None  # side of the model's input, likewise; None is what the variant is made for

    def __post_init__(self) -> None:
        numbers = {"global-batch": self.batch, "examples": self.examples, "side": self.side}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")


# XLA would time its own kernels on the GPU, which is not here; cuBLAS's matmuls need no timing.
NO_AUTOTUNING = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


class Compiler:
    """The process that compiles for machines such as `topology`; use as a context.

    Raises:
        UserError: if there is no such topology, or its compiler is not installed.
    """

    def __init__(self, topology: str) -> None:
        gpu = hardware.slice_of(topology)[0].switched
        module, extra = ("jax_cuda13_plugin", "cuda") if gpu else ("libtpu", "tpu")
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"plan: needs {module}, the compiler; install the extra: pip install '.[{extra}]'"
            )
        self.flags = NO_AUTOTUNING if gpu else ""
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.stderr.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer of `plan.compile` to a request.

        Raises:
            UserError: if the answer is an error, or the compiler died.
        """
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code, self.process = self.process.wait(), None
            last = self._last_line()
            raise UserError(f"topology={request['topology']}: the compiler ended with {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        env["XLA_FLAGS"] = self.flags
        command = [sys.executable, "-m", "scaling.plan.compile"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=self.stderr)

    def _last_line(self) -> str:
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"
