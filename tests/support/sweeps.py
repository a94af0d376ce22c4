"""Sweeps by a fake trainer: a study's file, its config, and what the trainer notes down."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.errors import UserError

WORKER = (sys.executable, "-m", "tests.support.fake_trainer")
BASE: dict[str, Any] = {
    "model": {"variant": "F/7"},
    "train": {"seed": 0, "duration": "4 steps"},
    "mesh": {"data": -1},
    "optimizer": {"learning_rate": 0.01},
    "evaluators": {},
}
CLASSIFIED = {**BASE, "evaluators": {"fd": {"classifier": "runs/c", "classifier_config": "configs/c.py"}}}


def load_dict(source: str, overrides: Mapping[str, Any], base: Mapping[str, Any] = BASE) -> dict[str, Any]:
    """What reading a config promises: the whole config, or a UserError that names the key."""
    config = json.loads(json.dumps(base))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        place = config
        for section in sections:
            place = place.get(section, {})
        if name not in place:
            raise UserError(f"{key}: no such key")
        place[name] = value
    return config


def starts(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / run / "starts.jsonl").read_text().splitlines()]
