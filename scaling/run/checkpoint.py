"""Orbax checkpoints of a run: asynchronous, atomic, and never trusted to be undamaged.

Restoring a checkpoint fails for one of three reasons: it does not fit the config, this machine cannot read it
now, or it is damaged. Only damage is a reason to take the previous one, and only when it is proven: an array,
read into the host's memory in its own shape and on no device, is missing or cannot be decoded.
"""

import contextlib
import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import absl.logging
import jax
import orbax.checkpoint as ocp

from scaling.errors import UserError
from scaling.run import reading_locks
from scaling.run.checkpoint_digests import CheckedHandler
from scaling.run.checkpoint_reading import (
    DAMAGED,
    DOUBTED,
    FINE,
    MISFIT,
    Outcome,
    gather_texts,
    hide_abandoned_reads,
    read_every_array,
    status_of,
    try_restore,
    worst_outcome,
)
from scaling.run.folder import steps_in

log = logging.getLogger(__name__)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed write is reported once, here
absl.logging.set_verbosity(absl.logging.FATAL)  # orbax logs each option that it sets, and an error five times

# Replicas share the writing of an array by slices; a small slice costs more to compile than to write.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)


class Misfit(UserError):
    """The error that a run is not of this config or these data; `folder` is the run's."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class Checkpoints:
    """The checkpoints of a run, in `checkpoints/<step>/`: the state, the data position and the config.

    Use it as a context manager: on exit it waits for the checkpoint that is being written.
    """

    def __init__(
        self, folder: Path | str, keep: int = 2, read_only: bool = False, keep_at: Sequence[int] = ()
    ) -> None:
        self.folder, self.read_only = Path(folder).absolute(), read_only
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder}: no checkpoints there; train the run first")
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep), reading_locks.KeepWhatIsRead(self.folder)]
        kept += [policies.CustomSteps(list(keep_at))] if keep_at else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policies.AnyPreservationPolicy(kept),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # A folder that cannot be made in the background keeps its threads waiting for it, for 300 s.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            lightweight_initialize=True,  # damage is detected when a step is restored
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, CheckedHandler())
        handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        try:
            self.manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)
        except OSError as e:
            raise UserError(
                f"{self.folder}: cannot be opened ({e.strerror}); give access to it, then try again"
            ) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            with contextlib.suppress(OSError, ValueError):  # it says again what `wait` has said
                self.manager.close()

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint, and returns once the arrays are copied off the device.

        Raises:
            UserError: if this or the previous checkpoint could not be written.
        """
        if step in self.manager.all_steps():
            return
        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._write_error(f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free")
        hide_abandoned_reads()  # and writes, if one fails
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta)))
        try:
            self.manager.save(step, args=args)
        except (OSError, ValueError) as e:
            raise self._write_error(str(e)) from e

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: if it could not be written.
        """
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as e:
            raise self._write_error(str(e)) from e

    def _write_error(self, reason: str) -> UserError:
        steps = self.steps()
        newest = f"step {steps[-1]} is kept" if steps else "none is kept"
        line = reason.strip().splitlines()[0][:200]
        return UserError(
            f"{self.folder}: a checkpoint could not be written ({line}); {newest}; "
            "free space or give access, then resume"
        )

    def holds(self, step: int) -> bool:
        """Returns whether the step's checkpoint is completely on disk."""
        return (self.folder / str(step)).is_dir()

    def restore(self, like: Any, saved: int | None = None, step: int | None = None) -> tuple[Any, int] | None:
        """Restores the newest undamaged checkpoint, or that of `step`, as (state, step).

        It has the shapes and shardings of `like`.

        An array for which `like` has LEFT_OUT is not read, and stays LEFT_OUT.

        A damaged checkpoint is moved to `broken/`, and the log says so. `saved` is the newest step that was
        saved according to the run folder, None if no step was. Returns None if the run has no checkpoint yet.

        Raises:
            Misfit: if the newest does not fit `like`; nothing is moved.
            UserError: if the newest cannot be read on this machine now, in which case nothing is moved; or if
                a step was saved, but no undamaged checkpoint is left.
        """
        hide_abandoned_reads()
        if step is not None:
            return self._restore_step(like, step), step
        tried: set[int] = set()
        while (step := self._newest(tried)) is not None:
            tried.add(step)
            path = self.folder / str(step)
            outcome, state = self._read(path, like)
            if outcome.kind == FINE:
                return state, step
            gc.collect()  # frees the arrays that were read before the failure from the devices
            self._set_aside(path, outcome.reason)
        recorded = gather_texts("" if saved is None else str(saved))[0]
        if not tried and not recorded:
            return None
        lost = max(tried) if tried else recorded
        raise UserError(
            f"{self.folder}: no checkpoint there can be read, and step {lost} was saved; "
            f"put its folder back, or delete {self.folder.parent} to begin again"
        )

    def _restore_step(self, like: Any, step: int) -> Any:
        if step not in (steps := steps_in(self.folder)):
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint={step}: {self.folder} has {have}; choose one of them")
        outcome, state = self._read(self.folder / str(step), like)
        if outcome.kind != FINE:
            raise UserError(f"checkpoint={step}: is damaged ({outcome.reason}); choose another")
        return state

    def _newest(self, tried: set[int]) -> int | None:
        """Returns the newest step in the folder that was not tried yet, as the first process sees it."""
        untried = [step for step in steps_in(self.folder) if step not in tried]
        newest = gather_texts(str(untried[-1]) if untried else "")[0]
        return int(newest) if newest else None

    def _read(self, path: Path, like: Any) -> tuple[Outcome, Any]:
        """Reads one checkpoint; returns its outcome, FINE or proven to be DAMAGED, and its state.

        Raises:
            Misfit: if its arrays are not those of `like`.
            UserError: if this machine cannot read it now.
        """
        with reading_locks.held(path) if self.read_only else contextlib.nullcontext():
            own_outcome, state, error = try_restore(path / "state", like)
        outcome = worst_outcome(own_outcome)
        if outcome.kind == DOUBTED:
            proof = worst_outcome(read_every_array(path / "state"))
            outcome = proof if proof.kind != FINE else outcome
        if outcome.kind in (FINE, DAMAGED):
            return outcome, state
        if outcome.kind == MISFIT:
            advice = "choose another folder, or give the config and data that it was trained with"
            raise Misfit(f"{path}: {outcome.reason}; {advice}", self.folder.parent)
        if outcome.kind == DOUBTED and error is not None and status_of(error) is None:
            raise error  # an error of neither files nor memory is a bug
        raise UserError(
            f"{path}: cannot be restored on this machine now ({outcome.reason}), which proves no damage, so "
            "it stays where it is; mend that, then run the same command"
        ) from error

    def _set_aside(self, path: Path, reason: str) -> None:
        """Moves a damaged checkpoint to `broken/`, unless the folder is read only, and logs one line."""
        existed, failure, action = path.exists(), "", "passed over"
        if not self.read_only:
            if jax.process_index() == 0:
                try:
                    action = f"moved to {_move(path, self.folder.parent / 'broken')}"
                except OSError as e:
                    failure = str(e)
            if failure := gather_texts(failure)[0]:
                raise UserError(
                    f"{path}: is damaged, and cannot be moved to broken/ ({failure}); move it away"
                )
            self.manager.reload()
        if existed and jax.process_index() == 0:  # else the run continued meanwhile and deleted it
            log.warning("%s: is damaged (%s); %s", path, reason, action)


def _move(path: Path, folder: Path) -> Path:
    """Moves a checkpoint into the folder, under a name that is not taken there."""
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 0
    while target.exists():
        number += 1
        target = folder / f"{path.name}.{number}"
    shutil.move(path, target)
    return target
