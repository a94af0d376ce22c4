"""The names of a checkpoint's tensors as people have them, brought to those that a format's table has."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import numpy as np

from scaling.convert import rules
from scaling.convert.rules import Rules, Tensors
from scaling.errors import UserError

Rename = Callable[[str], str]

# What wrappers put before names, or into them: torch's DataParallel and DDP, torch.compile; Lightning before.
WRAPPER = re.compile(r"^model\.|(?:^|(?<=\.))(?:module|_orig_mod)\.")
COUNTS = ("n_averaged",)  # of torch's AveragedModel, beside the weights


def known(family: ModuleType, table: Rules, tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors by the names of the family's `table`, and what is to be said of it.

    Wrappers' prefixes go, names of other versions become today's, and the prefix that a model has beside its
    head is added or taken off: each where more tensors then have a name of the table.

    Raises: UserError where two tensors would get one name.
    """
    wanted = {name for rule in table for name in (*rules.names(rule), *rule.copies)}
    base = getattr(family, "BASE", "")
    bare = wanted | {name.removeprefix(base) for name in wanted} | {base + name for name in wanted}
    found = {name: tensor for name, tensor in tensors.items() if name not in COUNTS}
    said: list[str] = []
    for change, rename, among in [
        ("wrappers' prefixes taken off", _unwrapped, bare),
        *((change, rename, bare) for change, rename in _renames(family)),
        (f"{base!r} added", lambda name: base + name if base + name in wanted else name, wanted),
        (f"{base!r} taken off", lambda name: name.removeprefix(base) if name not in wanted else name, wanted),
    ]:
        new = {name: rename(name) for name in found}
        if len(among & set(new.values())) <= len(among & set(found)):
            continue
        if len(set(new.values())) < len(new):
            raise UserError(f"{change}: two tensors would have one name; give a file of one model")
        moved = sum(name != now for name, now in new.items())
        found = {new[name]: tensor for name, tensor in found.items()}
        said.append(f"names: {change} in {moved} of {len(found)}")
    unused = sorted(name for name in found if any(re.search(p, name) for p in getattr(family, "UNUSED", ())))
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        said.append(f"not read: {', '.join(unused[:3])}{more}")
    return {name: tensor for name, tensor in found.items() if name not in unused}, said


def _unwrapped(name: str) -> str:
    """The name without what wrappers put there; they may lie in one another."""
    while (shorter := WRAPPER.sub("", name)) != name:
        name = shorter
    return name


def _renames(family: ModuleType) -> Iterable[tuple[str, Rename]]:
    """Yields what is to be said and old name -> new."""
    for version, patterns in getattr(family, "RENAMED", {}).items():
        yield f"those of {version} taken", functools.partial(_replaced, patterns)


def _replaced(patterns: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


def require_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises UserError, naming the tensor, for numbers that are not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind in rules.FLOATS:
            bad = int((~np.isfinite(tensor.astype(np.float32))).sum())
            if bad:
                raise UserError(f"{name}: {bad} of {tensor.size} numbers are not finite; get the file again")
