"""Checks that a run folder holds what the command asks for, without which a run is not resumed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling import data
from scaling.data import fingerprints
from scaling.errors import UserError
from scaling.evaluators.base import require_tokenizer
from scaling.overrides import flat, tupled
from scaling.run import build
from scaling.run import config as run_config
from scaling.run.checkpoint import Misfit
from scaling.run.folder import MAY_DIFFER, read_description, read_status
from scaling.run.options import Config
from scaling.validation import parse_dataclass

IMPORTING = "importing"  # status of a folder until the import is complete


def apply_imported(path: Path, cfg: Config) -> Config:
    """Returns the config with the values that an imported checkpoint set (`convert.transfer`)."""
    description = read_description(path) or {}
    values, changes = flat(cfg.raw), {}
    for key, (before, after) in (description.get("imported") or {}).get("set", {}).items():
        if values.get(key) == tupled(before):
            changes[key] = after
    return run_config.changed(cfg, changes) if changes else cfg


def require_same_config(path: Path, cfg: Config) -> None:
    """Checks that the folder holds no run of another config.

    Raises:
        UserError: if it does.
    """
    description = read_description(path)
    if description is None:
        return
    old, new = flat(run_config.stored(description)), flat(cfg.raw)
    may_differ: tuple[str, ...] = MAY_DIFFER
    if cfg.optimizer.schedule == "constant":
        may_differ += ("train.duration",)
    if "fingerprint" in description:  # the data are compared by it, wherever they lie
        may_differ += ("data.data_dir",)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(may_differ):
            raise UserError(
                f"workdir={path}: holds a run with {key}={old.get(key)!r}, not {new.get(key)!r}; "
                "choose another folder, or give the same value to resume it"
            )


def require_same_tokens(path: Path, run: build.Run) -> None:
    """Checks that captions become the same tokens as when the folder's run was trained.

    Raises:
        UserError: if the tokenizer is another one.
    """
    info = (read_description(path) or {}).get("data") or {}
    if info.get("text") and run.info.text is not None:
        text = parse_dataclass(data.TextInfo, info["text"], "data.text")
        require_tokenizer(dataclasses.replace(run, info=dataclasses.replace(run.info, text=text)))


def require_same_data(path: Path, cfg: Config, fingerprint: Mapping[str, Any]) -> None:
    """Checks that the training data, of this `fingerprint`, are those that the folder's run began with.

    Raises:
        Misfit: if they are others.
    """
    before = (read_description(path) or {}).get("fingerprint")
    if before and (difference := fingerprints.difference(before, fingerprint)):
        advice = "put its data back, or choose another folder"
        raise Misfit(
            f"data: {cfg.data.name} {difference}, as the run in {path} had it; {advice}", path.absolute()
        )


def require_imported(path: Path) -> None:
    """Checks that the folder holds no import that was cut off.

    Raises:
        UserError: if it does.
    """
    if (read_status(path) or {}).get("status") == IMPORTING:
        raise UserError(f"workdir={path}: its import was not finished; give the same `scaling import` again")
