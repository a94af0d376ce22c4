"""Orbax checkpoints of a run: asynchronous, atomic, and never trusted to be whole.

A checkpoint that is not restored does not fit what was asked for, or this machine cannot read it now, or it
is damaged. Only damage is a reason to take the one before, and only when it is proven: an array, read into
the host's memory in its own shape and on no device, is missing or cannot be decoded.
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

from scaling.engine.runfolder import steps_in
from scaling.engine.sharding import path_of
from scaling.errors import UserError

log = logging.getLogger(__name__)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed write is reported once, here
absl.logging.set_verbosity(absl.logging.ERROR)  # orbax speaks of every option that it sets itself

# Replicas share the writing of an array by slices; a small slice costs more to compile than to write.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)

# What became of an attempt to read a step; where processes differ, the highest counts for all.
FINE, DOUBTED, DAMAGED, UNREADABLE, MISFIT = range(5)
# Statuses of tensorstore and XLA: of bytes that are missing or cannot be decoded, and of a machine's limits.
DAMAGE = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")
LIMITS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # the system's errors that are damage
MESSAGE_BYTES = 400  # of a reason that processes tell one another


class Misfit(UserError):
    """A checkpoint whose arrays are not those of the config; `folder` is that of its run."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


@dataclass(frozen=True)
class _Outcome:
    kind: int  # FINE to MISFIT
    reason: str = ""


class Checkpoints:
    """`checkpoints/<step>/` of a run: the state, and beside it the data position and the config.

    Use as a context: leaving it waits for what is still being written.
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
            lightweight_initialize=True,  # damage is found where a step is restored
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

    def holds(self, step: int) -> bool:
        """Returns whether the step's checkpoint is on disk, and no longer being written."""
        return (self.folder / str(step)).is_dir()

    def restore(self, like: Any, saved: int | None = None) -> tuple[Any, int] | None:
        """Restores the newest whole checkpoint as (state, step), in the shapes and shardings of `like`.

        A damaged one is moved to `broken/`, and a line of the log says so. Returns None if the run has no
        checkpoint yet; `saved` is the newest step that the run folder says was saved (None: it says of none).

        Raises:
            Misfit: if the newest does not fit `like`; nothing is moved.
            UserError: if it cannot be read on this machine now, and nothing is moved; if one was saved, and
                none is whole.
        """
        _hide_abandoned_reads()
        tried: set[int] = set()
        while (step := self._newest(tried)) is not None:
            tried.add(step)
            path = self.folder / str(step)
            outcome, state = self._read(path, like)
            if outcome.kind == FINE:
                return state, step
            gc.collect()  # the arrays that were read before it failed leave the devices
            self._set_aside(path, outcome.reason)
        known = _everyones("" if saved is None else str(saved))[0]
        if not tried and not known:
            return None
        lost = max(tried) if tried else known
        raise UserError(
            f"{self.folder}: no checkpoint there can be read, and step {lost} was saved; "
            f"put its folder back, or delete {self.folder.parent} to begin again"
        )

    def _newest(self, tried: set[int]) -> int | None:
        """Returns the newest step in the folder that was not tried yet, as the first process sees it."""
        left = [step for step in steps_in(self.folder) if step not in tried]
        newest = _everyones(str(left[-1]) if left else "")[0]
        return int(newest) if newest else None

    def _read(self, path: Path, like: Any) -> tuple[_Outcome, Any]:
        """Returns the state of one checkpoint, or that it is damaged; raises where it is neither."""
        mine, state, error = _attempt(path / "state", like)
        outcome = _worst(mine)
        if outcome.kind == DOUBTED:
            proof = _worst(_proof(path / "state"))
            outcome = proof if proof.kind != FINE else outcome
        if outcome.kind in (FINE, DAMAGED):
            return outcome, state
        if outcome.kind == MISFIT:
            advice = "choose another folder, or give the config and data that it was trained with"
            raise Misfit(f"{path}: {outcome.reason}; {advice}", self.folder.parent)
        if outcome.kind == DOUBTED and error is not None and _status(error) is None:
            raise error  # it says nothing of files or of memory: a bug
        raise UserError(
            f"{path}: cannot be restored on this machine now ({outcome.reason}), which proves no damage, so "
            "it stays where it is; mend that, then run the same command"
        ) from error

    def _set_aside(self, path: Path, reason: str) -> None:
        """Moves a damaged checkpoint to `broken/` if the run is written here, and logs one line."""
        there, failure, where = path.exists(), "", "passed over"
        if not self.read_only:
            if jax.process_index() == 0:
                try:
                    where = f"moved to {_move(path, self.folder.parent / 'broken')}"
                except OSError as e:
                    failure = str(e)
            if failure := _everyones(failure)[0]:
                raise UserError(
                    f"{path}: is damaged, and cannot be moved to broken/ ({failure}); move it away"
                )
            self.manager.reload()
        if there and jax.process_index() == 0:  # else the run went on meanwhile, and no longer keeps it
            log.warning("%s: is damaged (%s); %s", path, reason, where)


def _move(path: Path, folder: Path) -> Path:
    """Moves a checkpoint into the folder, under a name that nothing there has."""
    folder.mkdir(exist_ok=True)
    target, more = folder / path.name, 0
    while target.exists():
        more += 1
        target = folder / f"{path.name}.{more}"
    shutil.move(path, target)
    return target


# --- reading, and telling why it failed ---


def _attempt(path: Path, like: Any) -> tuple[_Outcome, Any, Exception | None]:
    """Restores a state as `like` is, or returns what failed.

    Shapes are compared before arrays are read; each process reads its own shards, and waits for no other.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
        there = handler.metadata(path).tree
    except Exception:  # restoring does without, or fails too
        there = None
    if there is not None and (difference := _difference(there, like)):
        return _Outcome(MISFIT, difference), None, None
    try:
        state = handler.restore(path, args=ocp.args.StandardRestore(like))
    except Exception as e:  # orbax and tensorstore raise many kinds
        kind = UNREADABLE if _kind(e) == UNREADABLE else DOUBTED
        return _Outcome(kind, _reason(e)), None, e
    return _Outcome(FINE), state, None


def _difference(tree: Any, like: Any) -> str:
    """Names the first array that a checkpoint's tree of metadata and `like` do not have alike, if any."""
    there, here = _arrays(tree), _arrays(like)
    names = [*here, *(name for name in there if name not in here)]
    wrong = [name for name in names if there.get(name) != here.get(name)]
    if not wrong:
        return ""
    old, new = there.get(wrong[0]), here.get(wrong[0])
    part = 1 if old and new and old[0] == new[0] else 0  # the types, where the shapes are the same
    shown = [str(array[part]) if array else "absent" for array in (old, new)]
    return (
        f"{wrong[0]} is {shown[0]} there and {shown[1]} in this config "
        f"({len(wrong)} of {len(names)} arrays differ)"
    )


def _arrays(tree: Any) -> dict[str, tuple[list[int], str]]:
    """Returns the shape and type of each array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(path): (list(x.shape), np.dtype(x.dtype).name) for path, x in leaves}


def _proof(path: Path) -> _Outcome:
    """Reads every array plainly, one after another, into the host's memory; several processes share the work.

    The outcome is DAMAGED where one cannot be decoded, and DOUBTED where a failure proves nothing.
    """
    handler, array = ocp.PyTreeCheckpointHandler(), "its list of arrays"
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(handler.metadata(path).tree)
        for i in range(jax.process_index(), len(leaves), jax.process_count()):
            array = path_of(leaves[i][0])
            only = [leaf if j == i else ocp.PLACEHOLDER for j, (_, leaf) in enumerate(leaves)]
            item = jax.tree_util.tree_unflatten(structure, only)
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            handler.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
    except Exception as e:
        return _Outcome(_kind(e), f"{array}: {_reason(e)}")
    return _Outcome(FINE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> str | None:
    """Returns the status of tensorstore or XLA, or the system's error, that an exception or cause names."""
    for cause in _causes(error):
        named = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", str(cause))
        if named:
            return named[1]
        if isinstance(cause, OSError):
            return type(cause).__name__
    return None


def _kind(error: Exception) -> int:
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
    """Returns the innermost cause, in a line of about 200 characters at most."""
    inner = list(_causes(error))[-1]
    text = re.sub(r" \[tensorstore_spec.*", "", (str(inner).strip() or type(inner).__name__).splitlines()[0])
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-115:]}"


# --- several processes ---


def _worst(mine: _Outcome) -> _Outcome:
    """Returns the outcome that counts for all processes."""
    told = [text.partition(" ") for text in _everyones(f"{mine.kind} {mine.reason}")]
    return max((_Outcome(int(kind), reason) for kind, _, reason in told), key=lambda o: o.kind)


def _everyones(text: str) -> list[str]:
    """Returns the texts of all processes in their order, once all have given theirs."""
    if jax.process_count() == 1:
        return [text]
    padded = np.zeros(MESSAGE_BYTES, np.uint8)
    data = text.encode()[:MESSAGE_BYTES]
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


# --- what orbax prints of reads that it abandons ---

_shown = sys.unraisablehook


def _hide_abandoned_reads() -> None:
    """Keeps tracebacks off stderr that say no more than that reading failed.

    Where one array cannot be read, orbax closes its event loop while the others are being read, and each of
    those fails too, later and in threads of tensorstore.
    """
    global _shown
    if sys.unraisablehook is not _hook:
        _shown, sys.unraisablehook = sys.unraisablehook, _hook


def _hook(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    orbax = code is not None and "orbax" in code.co_filename
    if not orbax and str(unraisable.exc_value) != "Event loop is closed":
        _shown(unraisable)
