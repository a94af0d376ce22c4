"""Several processes of one run: how they find each other, and when one counts as lost."""

import importlib.util
import os
from pathlib import Path

from scaling.errors import UserError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOST_SECONDS = 30  # without a sign of life a process counts as lost: jax ends the others, and says so
SAID = f"several processes: {LOST_SECONDS} s after one is lost the others end, and the same command resumes"


def join() -> None:
    """Joins the other processes of this run, if there are any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, or jax finds them: the tasks of a
    SLURM step, the hosts of a TPU slice.

    Raises: UserError for a part of the three, an address without a port, or a count or place that is none.
    """
    count = mine = None
    if any(name in os.environ for name in NAMES):
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: must be HOST:PORT, of the first process")
        count = _number("JAX_NUM_PROCESSES", 1, "how many they are")
        mine = _number("JAX_PROCESS_ID", 0, "which this one is, from 0")
        if mine >= count:
            raise UserError(f"JAX_PROCESS_ID={mine}: must be less than JAX_NUM_PROCESSES={count}")
    elif _slurm_tasks() == 1 and not _on_tpu():
        return
    import jax

    jax.distributed.initialize(num_processes=count, process_id=mine, heartbeat_timeout_seconds=LOST_SECONDS)


def _number(name: str, least: int, words: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r}: must say {words}")
    return int(text)


def _slurm_tasks() -> int:
    """Of the step that this process is a task of."""
    return int(os.environ["SLURM_NTASKS"]) if "SLURM_STEP_NODELIST" in os.environ else 1


def _on_tpu() -> bool:
    chips = Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))
    chosen = os.environ.get("JAX_PLATFORMS", "tpu")
    return chips and "tpu" in chosen and importlib.util.find_spec("libtpu") is not None
