"""Tensor names as checkpoints in the wild have them, brought to those of a format's table."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from scaling.convert import rules
from scaling.convert.converter import Converter
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError

Rename = Callable[[str], str]

# Prefixes that wrappers add: Lightning's at the start, DataParallel's, DDP's and torch.compile's anywhere.
WRAPPER = re.compile(r"^model\.|(?:^|(?<=\.))(?:module|_orig_mod)\.")
COUNTS = ("n_averaged",)  # counters that torch's AveragedModel keeps beside the weights


def known(
    converter: Converter[Any], table: Rules, tensors: Tensors
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors by the names of the converter's `table`, and a line for each change of names.

    Wrappers' prefixes are removed, names of other versions become today's, and the prefix of a model with a
    head is added or removed. Each change is made only if more tensors then have a name of the table.

    Raises:
        UserError: if two tensors would get one name.
    """
    wanted = {name for rule in table for name in (*rules.names(rule), *rule.copies)}
    base = converter.base
    with_or_without_base = (
        wanted | {name.removeprefix(base) for name in wanted} | {base + name for name in wanted}
    )
    renamed = {name: tensor for name, tensor in tensors.items() if name not in COUNTS}
    notes: list[str] = []
    for change, rename, targets in [
        ("wrappers' prefixes taken off", _unwrap, with_or_without_base),
        *((change, rename, with_or_without_base) for change, rename in _version_renames(converter)),
        (f"{base!r} added", lambda name: base + name if base + name in wanted else name, wanted),
        (f"{base!r} taken off", lambda name: name.removeprefix(base) if name not in wanted else name, wanted),
    ]:
        new = {name: rename(name) for name in renamed}
        if len(targets & set(new.values())) <= len(targets & set(renamed)):
            continue
        if len(set(new.values())) < len(new):
            raise UserError(f"{change}: two tensors would have one name; give a file of one model")
        moved = sum(name != now for name, now in new.items())
        renamed = {new[name]: tensor for name, tensor in renamed.items()}
        notes.append(f"names: {change} in {moved} of {len(renamed)}")
    unused = sorted(name for name in renamed if any(re.search(each, name) for each in converter.unused))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"not read: {', '.join(unused[:3])}{more}")
    return {name: tensor for name, tensor in renamed.items() if name not in unused}, notes


def _unwrap(name: str) -> str:
    """Returns the name without the prefixes of wrappers, which may be nested."""
    while (shorter := WRAPPER.sub("", name)) != name:
        name = shorter
    return name


def _version_renames(converter: Converter[Any]) -> Iterable[tuple[str, Rename]]:
    """Yields a description of each version's change, and the function from its names to the table's."""
    for version, patterns in converter.renamed.items():
        yield f"those of {version} taken", functools.partial(_replace_patterns, patterns)


def _replace_patterns(patterns: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Checks that all floats are finite.

    Raises:
        UserError: if a number is not finite; the message names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.kind in rules.FLOATS:
            with np.errstate(over="ignore"):  # what float32 cannot hold is counted, too
                bad = int((~np.isfinite(tensor.astype(np.float32))).sum())
            if bad:
                raise UserError(f"{name}: {bad} of {tensor.size} numbers are not finite; get the file again")
