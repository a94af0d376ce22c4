"""Multi-host start-up: how the processes of one run find each other, and when one counts as lost."""

import importlib.util
import os
from pathlib import Path

from scaling.errors import UserError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOST_SECONDS = 30  # time without a heartbeat after which a process is lost: jax then ends the others
LOST_NOTE = (
    f"several processes: {LOST_SECONDS} s after one is lost the others end, and the same command resumes"
)


def join() -> None:
    """Joins the other processes of this run, if there are any and it has not joined them before.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, or jax finds them: the tasks of a
    SLURM step, the hosts of a TPU slice.

    Raises:
        UserError: if only some of the three are set, the address has no port, or the number of processes or
            this one's place is not a number in range.
    """
    count = place = None
    if any(name in os.environ for name in NAMES):
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: must be HOST:PORT, of the first process")
        count = _read_number("JAX_NUM_PROCESSES", 1, "how many they are")
        place = _read_number("JAX_PROCESS_ID", 0, "which this one is, from 0")
        if place >= count:
            raise UserError(f"JAX_PROCESS_ID={place}: must be less than JAX_NUM_PROCESSES={count}")
    elif _slurm_tasks() == 1 and not _on_tpu():
        return
    import jax

    if jax.distributed.is_initialized():
        return
    jax.distributed.initialize(num_processes=count, process_id=place, heartbeat_timeout_seconds=LOST_SECONDS)


def _read_number(name: str, minimum: int, meaning: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < minimum:
        raise UserError(f"{name}={text!r}: must say {meaning}")
    return int(text)


def _slurm_tasks() -> int:
    """Returns the number of tasks in the SLURM step of this process; 1 outside SLURM."""
    return int(os.environ["SLURM_NTASKS"]) if "SLURM_STEP_NODELIST" in os.environ else 1


def _on_tpu() -> bool:
    has_chips = Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return has_chips and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None
