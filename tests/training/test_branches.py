"""Branches of one long run: decays from kept checkpoints, which equal runs of that length from the start."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.run import build, restore
from scaling.run.folder import steps_in
from scaling.training import config, loop
from tests.test_house import ROOT

DIT = str(ROOT / "tests/support/tiny_dit.py")
WSD = ["optimizer.schedule=wsd", "optimizer.cooldown=3 steps"]


def trained(folder: Path, *overrides: str) -> Any:
    loop.train(config.load(DIT, [*WSD, *overrides]), folder)
    return restore.restore_run(folder).weights


def rates(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["values"]["learning_rate"] for line in lines if line["event"] == "train"}


def test_a_branch_of_a_kept_checkpoint_equals_a_run_of_its_length(tmp_path: Path) -> None:
    kept = ["checkpoint.every=100 %", "checkpoint.keep=1", "checkpoint.keep_at=('5 steps', '7 steps')"]
    trained(tmp_path / "long", "train.duration=12 steps", *kept)
    assert steps_in(tmp_path / "long/checkpoints") == [5, 7, 12]
    branch = trained(
        tmp_path / "branch", "train.duration=8 steps", f"train.continue_from={tmp_path}/long/checkpoints/5"
    )
    alone = trained(tmp_path / "alone", "train.duration=8 steps")
    jax.tree.map(np.testing.assert_array_equal, branch, alone)
    assert list(rates(tmp_path / "branch")) == [6, 7, 8]
    found = [rates(tmp_path / "branch")[step] for step in (6, 7, 8)]
    np.testing.assert_allclose(found, [1e-3 * (1 - (n / 3) ** 0.5) for n in range(3)], rtol=1e-5)


BAD = {
    "cooldown is of wsd": (["optimizer.cooldown=3 steps"], r"optimizer\.cooldown='3 steps': must be "),
    "wsd has a cooldown": (["optimizer.schedule=wsd"], r"optimizer\.cooldown=None: must be a duration "),
    "too long": (
        ["optimizer.schedule=wsd", "optimizer.cooldown=11 steps"],
        r"optimizer\.cooldown='11 steps': is 11 steps, and 10 follow the warm-up; make it ",
    ),
    "no duration": (["optimizer.schedule=wsd", "optimizer.cooldown=soon"], r"optimizer\.cooldown='soon'"),
    "beyond the end": (
        ["checkpoint.keep_at=('13 steps',)"],
        r"checkpoint\.keep_at='13 steps': is step 13, and the run has 12; name one of them",
    ),
    "kept at no duration": (["checkpoint.keep_at=('x',)"], r"checkpoint\.keep_at='x': must be "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_no_run_can_have_is_one_line(case: str) -> None:
    overrides, message = BAD[case]
    with pytest.raises(UserError, match=f"^{message}") as error:
        build.build(config.load(DIT, overrides))
    assert "\n" not in str(error.value)
