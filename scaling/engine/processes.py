"""Several processes of one run: how they find each other, and when one counts as lost."""

import importlib.util
import os
from pathlib import Path

LOST_SECONDS = 30  # without a sign of life a process counts as lost: jax ends the others, and says so
SAID = f"several processes: {LOST_SECONDS} s after one is lost the others end, and the same command resumes"


def join() -> None:
    """Joins the other processes of this run, if there are any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, or jax finds them: the tasks of a
    SLURM step, the hosts of a TPU slice.
    """
    named = "JAX_COORDINATOR_ADDRESS" in os.environ
    if not (named or _slurm_tasks() > 1 or _on_tpu()):
        return
    import jax

    count, mine = (
        int(os.environ[name]) if named else None for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    jax.distributed.initialize(num_processes=count, process_id=mine, heartbeat_timeout_seconds=LOST_SECONDS)


def _slurm_tasks() -> int:
    """Of the step that this process is a task of."""
    return int(os.environ["SLURM_NTASKS"]) if "SLURM_STEP_NODELIST" in os.environ else 1


def _on_tpu() -> bool:
    chips = Path("/dev/accel0").exists() or any(Path("/dev/vfio").glob("[0-9]*"))
    chosen = os.environ.get("JAX_PLATFORMS", "tpu")
    return chips and "tpu" in chosen and importlib.util.find_spec("libtpu") is not None
