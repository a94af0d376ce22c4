"""Counts configurations of the made-up studies, as `scaling.training.count` counts real ones."""

import json
import sys

from tests.study.conftest import PATCHES, SIZES, macs


def count(overrides: dict) -> dict:
    size, _, patch = overrides.get("model.variant", "F/7").partition("/")
    depth, width, _ = SIZES[size]
    width = overrides.get("model.width", width)
    if int(patch) not in PATCHES:
        return {"error": f"model.variant={overrides['model.variant']!r}: no such variant"}
    tokens, gmacs = macs(depth, width, int(patch))
    steps = int(str(overrides.get("train.duration", "800 steps")).split()[0])
    return {
        "params": 12 * depth * width**2, "gmacs": gmacs, "tokens": tokens, "examples": 64 * steps,
        "train_flops": 6e9 * gmacs * 64 * steps, "config": {"optimizer": {"learning_rate": 1e-3}},
    }  # fmt: skip


if __name__ == "__main__":
    json.dump([count(request["overrides"]) for request in json.load(sys.stdin)], sys.stdout)
