"""A study folder as a table."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from scaling.errors import UserError
from scaling.study import results

FIRST = ["run", "step", "model.variant", "train.seed", "depth", "width", "heads", "patch"]
COLUMNS = [*FIRST, "params", "gmacs", "tokens", "train_flops", "fd_mnist", "fd_mnist_floor"]


def test_a_row_for_each_run_and_step(make_study: Callable[..., Path], tmp_path: Path) -> None:
    table = results.load(make_study(tmp_path, seeds=(0, 1)))
    assert list(table.columns) == COLUMNS
    assert len(table) == 12 * 2 * 4
    one = table[table.run == "variant=F-7_seed=1"]
    assert list(one.step) == [200, 400, 600, 800]
    assert set(one["model.variant"]) == {"F/7"}
    assert list(one.train_flops / one.step) == [6e9 * one.gmacs.iloc[0] * 64] * 4


def test_the_written_table_reads_back_alone(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path)
    folder = results.read(root)
    written = pd.read_csv(results.write(folder))
    pd.testing.assert_frame_equal(written, folder.table, check_dtype=False)
    (root / "runs").rename(root / "elsewhere")
    alone = results.read(root)
    pd.testing.assert_frame_equal(alone.table, written)
    assert alone.done() == folder.done()


def test_a_key_that_a_run_does_not_sweep_comes_from_its_config(
    make_study: Callable[..., Path], make_run: Callable[..., None], tmp_path: Path
) -> None:
    root = make_study(tmp_path, sizes="A")
    study = json.loads((root / "study.json").read_text())
    model = {"depth": 2, "width": 32, "heads": 2, "patch": 7}
    make_run(root / "runs/seed=5", {"train.seed": 5}, model, {800: {"fd_mnist": 9.0}})
    study["runs"]["seed=5"] = {"train.seed": 5}
    (root / "study.json").write_text(json.dumps(study))
    table = results.load(root)
    assert table[table.run == "seed=5"]["model.variant"].item() == "F/7"


def test_values_of_one_step_meet_and_torn_lines_end(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, sizes="A")
    run = root / "runs/variant=A-7_seed=0"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "evaluate", "step": 800, "examples": 1, "wall": 1, "values": {"extra": 2.0}}\n')
        file.write('{"event": "evaluate", "step": 900, "exa')
    rows = results.load(root)
    rows = rows[rows.run == run.name]
    assert list(rows.step) == [200, 400, 600, 800]
    assert rows.iloc[-1].extra == 2.0
    assert rows.iloc[-1].fd_mnist > 0


def test_runs_tell_how_they_are(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, sizes="AF")

    def change(run: str, **fields: object) -> None:
        file = root / "runs" / run / "status.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    change("variant=A-14_seed=0", status="failed", reason="loss is NaN")
    change("variant=A-7_seed=0", status="running", step=400)
    change("variant=A-4_seed=0", status="running", step=400, heartbeat=time.time() - 3600)
    (root / "runs/variant=F-14_seed=0/status.json").write_text("{")
    for file in (root / "runs/variant=F-7_seed=0").iterdir():
        file.unlink()
    (root / "runs/variant=F-7_seed=0/log.txt").write_text("$ scaling train\nerror: no data\n\n")
    (root / "runs/variant=F-4_seed=0").rename(root / "gone")
    found = {run.name.split("_")[0][8:]: (run.status, run.reason) for run in results.read(root).runs}
    assert found["A-14"] == ("failed", "loss is NaN")
    assert found["A-7"] == ("running", None)
    assert found["A-4"] == ("broken", "ended without a word at step 400")
    assert found["F-14"][0] == "broken"
    assert found["F-7"] == ("failed", "no data")
    assert found["F-4"] == ("missing", None)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no study\.json"):
        results.load(tmp_path)
    (tmp_path / "study.json").write_text('{"runs": {}}')
    with pytest.raises(UserError, match=r"neither runs nor results\.csv"):
        results.load(tmp_path)


def test_the_room_imports_no_jax(make_study: Callable[..., Path], tmp_path: Path) -> None:
    """Not even to make a report: a colleague's laptop need not have it."""
    make_study(tmp_path, sizes="A")
    code = (
        "import sys, pkgutil, importlib, scaling.study\n"
        "for m in pkgutil.iter_modules(scaling.study.__path__):\n"
        "    importlib.import_module('scaling.study.' + m.name)\n"
        "from scaling.study.results import load\n"
        f"assert len(load({str(tmp_path)!r})) == 12\n"
        "assert not {'jax', 'flax', 'optax', 'orbax', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
