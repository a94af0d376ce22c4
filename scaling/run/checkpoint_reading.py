"""Reading of a checkpoint's arrays, and why it failed: a misfit, the machine's limits, or proven damage."""

import errno
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaling.parallel.sharding import path_of
from scaling.run.checkpoint_digests import damaged_description

# Outcomes of an attempt to read a step; where processes differ, the highest one counts for all.
FINE, DOUBTED, DAMAGED, UNREADABLE, MISFIT = range(5)
# Statuses of tensorstore and XLA: for bytes that are missing or cannot be decoded; for a machine's limits.
DAMAGE = ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")
LIMITS = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # errno values that prove damage
LEFT_OUT = ocp.PLACEHOLDER  # stands in a tree for an array that is not to be read
MESSAGE_BYTES = 400  # longest reason that processes send one another


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt to read a checkpoint, or of its proof."""

    kind: int  # FINE to MISFIT
    reason: str = ""


def try_restore(path: Path, like: Any) -> tuple[Outcome, Any, Exception | None]:
    """Restores a state in the shapes and shardings of `like`; returns (outcome, state, error).

    Shapes are compared before arrays are read. Each process reads its own shards, and waits for no other.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        if reason := damaged_description(path):
            return Outcome(DAMAGED, reason), None, None
    except OSError as e:
        return Outcome(_outcome_kind(e), _reason(e)), None, e
    try:
        stored = handler.metadata(path).tree
    except Exception:  # restoring needs no metadata, or fails too
        stored = None
    if stored is not None and (difference := _first_difference(stored, like)):
        return Outcome(MISFIT, difference), None, None
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        state = handler.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=restore_args))
    except Exception as e:  # orbax and tensorstore raise many kinds
        kind = UNREADABLE if _outcome_kind(e) == UNREADABLE else DOUBTED
        return Outcome(kind, _reason(e)), None, e
    return Outcome(FINE), state, None


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


def read_every_array(path: Path) -> Outcome:
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
        return Outcome(_outcome_kind(e), f"{array}: {_reason(e)}")
    return Outcome(FINE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: Exception) -> str | None:
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
    status = status_of(error)
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


def worst_outcome(own: Outcome) -> Outcome:
    """Returns the outcome that counts for all processes."""
    messages = [text.partition(" ") for text in gather_texts(f"{own.kind} {own.reason}")]
    return max((Outcome(int(kind), reason) for kind, _, reason in messages), key=lambda o: o.kind)


def gather_texts(text: str) -> list[str]:
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


def hide_abandoned_reads() -> None:
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
