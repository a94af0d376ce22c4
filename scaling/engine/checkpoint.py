"""Orbax checkpoints of a run: asynchronous, atomic, and never trusted to be whole."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import absl.logging
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaling.errors import UserError

log = logging.getLogger(__name__)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed write is reported once, here
absl.logging.set_verbosity(absl.logging.ERROR)  # orbax speaks of every option that it sets itself

# Replicas share the writing of an array by slices; a small slice costs more to compile than to write.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)


class Checkpoints:
    """`checkpoints/<step>/` of a run: the state, and beside it the data position and the config.

    Use as a context: leaving it waits for what is still being written.
    """

    def __init__(self, folder: Path | str, keep: int = 2, read_only: bool = False) -> None:
        self.folder, self.read_only = Path(folder).absolute(), read_only
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder}: no checkpoints there; train the run first")
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self.manager.close()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied off the device.

        Raises:
            UserError: if this or the previous checkpoint could not be written.
        """
        if step in self.manager.all_steps():
            return
        need, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if free < need:
            raise self._unwritten(f"{need / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free")
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
        try:
            self.manager.save(step, args=args)
        except (OSError, ValueError) as e:
            raise self._unwritten(str(e)) from e

    def wait(self) -> None:
        """Until everything is on disk; raises UserError if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as e:
            raise self._unwritten(str(e)) from e

    def _unwritten(self, reason: str) -> UserError:
        kept = self.steps()
        last = f"step {kept[-1]} is kept" if kept else "none is kept"
        first = reason.strip().splitlines()[0][:200]
        return UserError(
            f"{self.folder}: a checkpoint could not be written ({first}); {last}: free space, then resume"
        )

    def restore(self, like: Any) -> tuple[Any, int] | None:
        """The newest whole checkpoint as (state, step), in the shapes and shardings of `like`.

        A broken one is moved to `broken/` and said so; None if the run has no checkpoint yet.

        Raises:
            UserError: if there are checkpoints and none is whole.
        """
        found = self.steps()
        for step in reversed(found):
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                return self.manager.restore(step, args=args)["state"], step
            except Exception as e:  # orbax and tensorstore raise many kinds for a damaged file
                reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
                log.warning("checkpoint %s/%d cannot be read (%s)", self.folder, step, reason)
                self._set_aside(step)
        if found:
            raise UserError(
                f"{self.folder}: no checkpoint there can be read; delete the folder to start again"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if self.read_only:
            return
        if jax.process_index() == 0:
            broken = self.folder.parent / "broken"
            broken.mkdir(exist_ok=True)
            shutil.rmtree(broken / str(step), ignore_errors=True)
            shutil.move(self.folder / str(step), broken / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self.manager.reload()
