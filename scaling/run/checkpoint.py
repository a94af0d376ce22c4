"""Orbax checkpoints of a run: asynchronous, atomic, and never trusted to be undamaged.

Restoring a checkpoint fails for one of three reasons: it does not fit the config, this machine cannot read it
now, or it is damaged. Only damage is a reason to take the previous one, and only when it is proven: an array,
read into the host's memory in its own shape and on no device, is missing or cannot be decoded.
"""

import errno
import gc
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaling.errors import UserError
from scaling.parallel.sharding import path_of
from scaling.run.folder import steps_in

log = logging.getLogger(__name__)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed write is reported once, here
absl.logging.set_verbosity(absl.logging.ERROR)  # orbax logs every option that it sets itself

# Replicas share the writing of an array by slices; a small slice costs more to compile than to write.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)

# Outcomes of an attempt to read a step; where processes differ, the highest one counts for all.
FINE, DOUBTED, DAMAGED, UNREADABLE, MISFIT = range(5)
# Statuses of tensorstore and XLA: for bytes that are missing or cannot be decoded; for a machine's limits.
DAMAGE = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")
LIMITS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # errno values that prove damage
LEFT_OUT = ocp.PLACEHOLDER  # stands in a tree for an array that is not to be read
MESSAGE_BYTES = 400  # longest reason that processes send one another


class Misfit(UserError):
    """The error that a checkpoint's arrays are not those of the config; `folder` is its run's."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class _Outcome:
    kind: int  # FINE to MISFIT
    reason: str = ""


class Checkpoints:
    """The checkpoints of a run, in `checkpoints/<step>/`: the state, the data position and the config.

    Use it as a context manager: on exit it waits for the checkpoint that is being written.
    """

    def __init__(self, folder: Path | str, keep: int = 2, read_only: bool = False) -> None:
        self.folder, self.read_only = Path(folder).absolute(), read_only
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder}: no checkpoints there; train the run first")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            lightweight_initialize=True,  # damage is detected when a step is restored
        )
        try:
            self.manager = ocp.CheckpointManager(self.folder, item_names=("state", "meta"), options=options)
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
            raise self._write_error(f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free")
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta)))
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
            f"{self.folder}: a checkpoint could not be written ({line}); {newest}: free space, then resume"
        )

    def holds(self, step: int) -> bool:
        """Returns whether the step's checkpoint is completely on disk."""
        return (self.folder / str(step)).is_dir()

    def restore(self, like: Any, saved: int | None = None) -> tuple[Any, int] | None:
        """Restores the newest undamaged checkpoint as (state, step), in the shapes and shardings of `like`.

        An array for which `like` has LEFT_OUT is not read, and stays LEFT_OUT.

        A damaged checkpoint is moved to `broken/`, and the log says so. `saved` is the newest step that was
        saved according to the run folder, None if no step was. Returns None if the run has no checkpoint yet.

        Raises:
            Misfit: if the newest does not fit `like`; nothing is moved.
            UserError: if the newest cannot be read on this machine now, in which case nothing is moved; or if
                a step was saved, but no undamaged checkpoint is left.
        """
        _hide_abandoned_reads()
        tried: set[int] = set()
        while (step := self._newest(tried)) is not None:
            tried.add(step)
            path = self.folder / str(step)
            outcome, state = self._read(path, like)
            if outcome.kind == FINE:
                return state, step
            gc.collect()  # frees the arrays that were read before the failure from the devices
            self._set_aside(path, outcome.reason)
        recorded = _gather_texts("" if saved is None else str(saved))[0]
        if not tried and not recorded:
            return None
        lost = max(tried) if tried else recorded
        raise UserError(
            f"{self.folder}: no checkpoint there can be read, and step {lost} was saved; "
            f"put its folder back, or delete {self.folder.parent} to begin again"
        )

    def _newest(self, tried: set[int]) -> int | None:
        """Returns the newest step in the folder that was not tried yet, as the first process sees it."""
        untried = [step for step in steps_in(self.folder) if step not in tried]
        newest = _gather_texts(str(untried[-1]) if untried else "")[0]
        return int(newest) if newest else None

    def _read(self, path: Path, like: Any) -> tuple[_Outcome, Any]:
        """Reads one checkpoint; returns its outcome, FINE or proven to be DAMAGED, and its state.

        Raises:
            Misfit: if its arrays are not those of `like`.
            UserError: if this machine cannot read it now.
        """
        own_outcome, state, error = _try_restore(path / "state", like)
        outcome = _worst_outcome(own_outcome)
        if outcome.kind == DOUBTED:
            proof = _worst_outcome(_read_every_array(path / "state"))
            outcome = proof if proof.kind != FINE else outcome
        if outcome.kind in (FINE, DAMAGED):
            return outcome, state
        if outcome.kind == MISFIT:
            advice = "choose another folder, or give the config and data that it was trained with"
            raise Misfit(f"{path}: {outcome.reason}; {advice}", self.folder.parent)
        if outcome.kind == DOUBTED and error is not None and _status(error) is None:
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
            if failure := _gather_texts(failure)[0]:
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


# --- reading, and why it failed ---


def _try_restore(path: Path, like: Any) -> tuple[_Outcome, Any, Exception | None]:
    """Restores a state in the shapes and shardings of `like`; returns (outcome, state, error).

    Shapes are compared before arrays are read. Each process reads its own shards, and waits for no other.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = handler.metadata(path).tree
    except Exception:  # restoring needs no metadata, or fails too
        stored = None
    if stored is not None and (difference := _first_difference(stored, like)):
        return _Outcome(MISFIT, difference), None, None
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        state = handler.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args))
    except Exception as e:  # orbax and tensorstore raise many kinds
        kind = UNREADABLE if _outcome_kind(e) == UNREADABLE else DOUBTED
        return _Outcome(kind, _reason(e)), None, e
    return _Outcome(FINE), state, None


def _first_difference(tree: Any, like: Any) -> str:
    """Describes the first array in which a checkpoint's metadata and `like` differ; "" if none does."""
    stored, expected = _arrays(tree), _arrays(like)
    names = [*expected, *(name for name in stored if name not in expected)]
    expected |= {name: stored[name] for name in stored.keys() & _left_out(like)}
    differing = [name for name in names if stored.get(name) != expected.get(name)]
    if not differing:
        return ""
    old, new = stored.get(differing[0]), expected.get(differing[0])
    part = 1 if old and new and old[0] == new[0] else 0  # the types, where the shapes are the same
    old_text, new_text = (str(array[part]) if array else "absent" for array in (old, new))
    return (
        f"{differing[0]} is {old_text} there and {new_text} in this config "
        f"({len(differing)} of {len(names)} arrays differ)"
    )


def _arrays(tree: Any) -> dict[str, tuple[list[int], str]]:
    """Returns the shape and type of each array, by its path."""
    return {name: (list(x.shape), np.dtype(x.dtype).name) for name, x in _leaves(tree) if x is not LEFT_OUT}


def _left_out(tree: Any) -> set[str]:
    return {name for name, x in _leaves(tree) if x is LEFT_OUT}


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _read_every_array(path: Path) -> _Outcome:
    """Reads the arrays one by one into the host's memory; several processes share the work.

    The outcome is DAMAGED if an array cannot be decoded, and DOUBTED if a failure proves nothing.
    """
    handler, array = ocp.PyTreeCheckpointHandler(), "its list of arrays"
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(handler.metadata(path).tree)
        for i in range(jax.process_index(), len(leaves), jax.process_count()):
            array = path_of(leaves[i][0])
            only = [leaf if j == i else LEFT_OUT for j, (_, leaf) in enumerate(leaves)]
            item = jax.tree_util.tree_unflatten(structure, only)
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            handler.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    except Exception as e:
        return _Outcome(_outcome_kind(e), f"{array}: {_reason(e)}")
    return _Outcome(FINE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> str | None:
    """Returns the status of tensorstore or XLA, or the system's error, that an exception or cause names."""
    for cause in _causes(error):
        match = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", str(cause))
        if match:
            return match[1]
        if isinstance(cause, OSError):
            return type(cause).__name__
    return None


def _outcome_kind(error: Exception) -> int:
    """Returns DAMAGED for missing or undecodable bytes, UNREADABLE for a machine's limits, else DOUBTED."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return UNREADABLE
        if isinstance(cause, OSError):
            absent = isinstance(cause, FileNotFoundError) or cause.errno in ABSENT
            return DAMAGED if absent else UNREADABLE
        if isinstance(cause, (UnicodeDecodeError, json.JSONDecodeError)):
            return DAMAGED
    status = _status(error)
    if status in LIMITS:
        return UNREADABLE
    undecoded = status is None and any("Error decoding" in str(cause) for cause in _causes(error))
    return DAMAGED if status in DAMAGE or undecoded else DOUBTED


def _reason(error: Exception) -> str:
    """Returns the innermost cause, in a line of at most about 200 characters."""
    cause = list(_causes(error))[-1]
    text = re.sub(r" \[tensorstore_spec.*", "", (str(cause).strip() or type(cause).__name__).splitlines()[0])
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}"


# --- several processes ---


def _worst_outcome(own: _Outcome) -> _Outcome:
    """Returns the outcome that counts for all processes."""
    messages = [text.partition(" ") for text in _gather_texts(f"{own.kind} {own.reason}")]
    return max((_Outcome(int(kind), reason) for kind, _, reason in messages), key=lambda o: o.kind)


def _gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes in their order; waits until every process has given its own."""
    if jax.process_count() == 1:
        return [text]
    padded = np.zeros(MESSAGE_BYTES, np.uint8)
    data = text.encode()[:MESSAGE_BYTES]
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


# --- tracebacks that orbax prints of reads that it abandons ---

_previous_hook = sys.unraisablehook


def _hide_abandoned_reads() -> None:
    """Keeps tracebacks off stderr that only repeat that reading failed.

    If one array cannot be read, orbax closes its event loop while the others are being read, and each of
    those fails too, later and in threads of tensorstore.
    """
    global _previous_hook
    if sys.unraisablehook is not _hook_without_orbax:
        _previous_hook, sys.unraisablehook = sys.unraisablehook, _hook_without_orbax


def _hook_without_orbax(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # only coroutines have one
    orbax = code is not None and "orbax" in code.co_filename
    if not orbax and str(unraisable.exc_value) != "Event loop is closed":
        _previous_hook(unraisable)
