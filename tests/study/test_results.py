"""A study folder as a table."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from scaling.errors import UserError
from scaling.study import laws, results
from scaling.study.evidence import evidence
from scaling.study.plot_data import view
from scaling.study.report import summary_table

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(file.parent for file in (ROOT / "experiments").glob("*/results.csv"))

FIRST = ["run", "step", "model.variant", "train.seed", "depth", "width", "heads", "patch"]
COSTS = ["params", "gmacs", "tokens", "train_flops", "examples", "hours", "annealed"]
COLUMNS = [*FIRST, *COSTS, "fd_mnist", "fd_mnist_floor"]


def change_status(run: Path, **fields: object) -> None:
    file = run / "status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_row_for_each_run_and_step(make_study: Callable[..., Path], tmp_path: Path) -> None:
    table = results.load(make_study(tmp_path, seeds=(0, 1)))
    assert list(table.columns) == COLUMNS
    assert len(table) == 12 * 2 * 4
    one = table[table.run == "variant=F-7_seed=1"]
    assert list(one.step) == [200, 400, 600, 800]
    assert set(one["model.variant"]) == {"F/7"}
    assert list(one.examples) == [64 * step for step in one.step]
    assert list(one.hours) == pytest.approx([0.1 * step / 3600 for step in one.step])
    assert list(one.annealed) == [False, False, False, True]
    assert list(one.train_flops / one.step) == [6e9 * one.gmacs.iloc[0] * 64] * 4


def test_the_written_table_reads_back_alone(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path)
    folder = results.read(root)
    results.write(folder)
    (root / "runs").rename(root / "elsewhere")
    alone = results.read(root)
    pd.testing.assert_frame_equal(alone.table, folder.table, check_dtype=False)
    assert alone.done() == folder.done() and laws.fit_laws(alone) == laws.fit_laws(folder)


def test_runs_keep_their_status_in_a_table_that_ships(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_study(tmp_path / "w", sizes="AF")
    failed, interrupted = (root / f"runs/variant={name}_seed=0" for name in ("A-14", "F-7"))
    change_status(failed, status="failed", reason="loss is NaN, at step 600", step=0)
    (failed / "metrics.jsonl").unlink()
    change_status(interrupted, status="interrupted", step=400)
    shutil.rmtree(root / "runs/variant=F-4_seed=0")
    folder = results.read(root)
    results.write(folder)
    (root / "runs").rename(root / "elsewhere")
    for alone in (results.read(root), results.read(ship(root, tmp_path / "s", "[{'train.seed': 0}]"))):
        states = {run.name: (run.status, run.reason, run.steps) for run in alone.runs if run.overrides}
        for run in folder.runs:
            assert states[run.name] == (run.status, run.reason, run.steps)
        assert set(alone.table.run) == set(folder.table.run)
        assert evidence(alone).left_out == evidence(folder).left_out


def test_a_table_without_its_columns_is_one_line(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, sizes="A")
    table = pd.read_csv(results.write(results.read(root)))
    table.drop(columns="gmacs").to_csv(root / "results.csv", index=False)
    shutil.rmtree(root / "runs")
    with pytest.raises(UserError, match=r"results\.csv: has no column gmacs; put back the file"):
        results.read(root)


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
    a14, a7, a4 = (root / f"runs/variant=A-{patch}_seed=0" for patch in (14, 7, 4))
    change_status(a14, status="failed", reason="loss is NaN")
    change_status(a7, status="running", step=400)
    change_status(a4, status="running", step=400, heartbeat=time.time() - 3600)
    (root / "runs/variant=F-14_seed=0/status.json").write_text("{")
    for file in (root / "runs/variant=F-7_seed=0").iterdir():
        file.unlink()
    (root / "runs/variant=F-7_seed=0/log.txt").write_text("$ scaling train\nerror: no data\n\n")
    (root / "runs/variant=F-4_seed=0").rename(root / "gone")
    statuses = {run.name.split("_")[0][8:]: (run.status, run.reason) for run in results.read(root).runs}
    assert statuses["A-14"] == ("failed", "loss is NaN")
    assert statuses["A-7"] == ("running", None)
    assert statuses["A-4"] == ("broken", "ended without a word at step 400")
    assert statuses["F-14"][0] == "broken"
    assert statuses["F-7"] == ("failed", "no data")
    assert statuses["F-4"] == ("missing", None)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no study\.json"):
        results.load(tmp_path)
    (tmp_path / "study.json").write_text('{"name": "s", "metric": "fd", "lower_is_better": true, "runs": {}}')
    with pytest.raises(UserError, match=r"neither runs nor results\.csv"):
        results.load(tmp_path)


# --- results that ship with their study file -----------------------------------------------------


def ship(root: Path, folder: Path, sweep: str, keys: dict[str, str] | None = None) -> Path:
    """Copies a study folder's table beside a study file, its columns under the names of `keys`."""
    folder.mkdir()
    written = root / "results.csv" if (root / "results.csv").exists() else results.write(results.read(root))
    pd.read_csv(written).rename(columns=keys or {}).to_csv(folder / "results.csv", index=False)
    (folder / "study.py").write_text(
        "from scaling.study.sweep import Study, product\n"
        f"STUDY = Study(name='shipped', config='c.py', sweep={sweep}, metric='fd_mnist', title='T')\n"
    )
    return folder


def test_a_study_file_stands_in_for_study_json(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path / "w", sizes="AF")
    sweep = "product({'model.variant': [f'{s}/{p}' for s in 'AF' for p in (14, 7, 4)], 'train.seed': [0]})"
    folder = results.read(ship(root, tmp_path / "shipped", sweep))
    described = {key: folder.study[key] for key in ("name", "title", "config")}
    assert described == {
        "name": "shipped", "title": "T", "config": "c.py",
    }  # fmt: skip
    assert folder.metric == results.read(root).metric
    stored = json.loads((root / "study.json").read_text())
    assert stored.keys() == folder.study.keys() and folder.study["runs"] == stored["runs"]
    assert folder.done() == results.read(root).done()
    pd.testing.assert_frame_equal(folder.table, results.read(root).table, check_dtype=False)


def test_a_shipped_table_may_have_more_runs_and_other_names(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    """Two seeds where the sweep has one, runs that bear other names there, and one that it lacks."""
    root = make_study(tmp_path / "w", seeds=(0, 1), sizes="A")
    sweep = "product({'train.seed': [0], 'model.variant': ['A/14', 'A/7', 'A/4', 'F/4']})"
    shipped = ship(root, tmp_path / "shipped", sweep)
    table = pd.read_csv(shipped / "results.csv").assign(run=lambda t: "other_" + t.run)
    table.to_csv(shipped / "results.csv", index=False)
    folder = results.read(shipped)
    assert len(folder.done()) == 6 and all(name.startswith("other_variant=A-") for name in folder.done())
    assert [(run.name, run.status) for run in folder.runs if run.status != "done"] == [
        ("variant=F-4_seed=0", "missing")
    ]
    assert set(folder.labels().values()) == {"A/14", "A/7", "A/4", "F/4"}
    assert set(view(folder).last["seeds"]) == {2}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_experiment_reads(path: Path) -> None:
    folder = results.read(path)
    assert {run.status for run in folder.runs} == {"done"} and len(folder.runs) >= 9
    assert folder.metric.name in folder.table
    last = view(folder).last
    assert len(last) >= 9 and laws.correlation(evidence(folder))["spearman"]
    before = {file.name for file in path.iterdir()}
    assert len(summary_table(path).splitlines()) >= len(last)
    assert {file.name for file in path.iterdir()} == before  # nothing is written there


# --- older names ---------------------------------------------------------------------------------


def test_older_keys_are_read_in_todays_words(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path / "w", sizes="A")
    study = json.loads((root / "study.json").read_text())
    study["runs"] = {name: {"model.family": "vit", **overrides} for name, overrides in study["runs"].items()}
    study["runs"]["seed=5"] = {"train.seed": 5}
    (root / "study.json").write_text(json.dumps(study))
    shutil.copytree(root / "runs/variant=A-7_seed=0", root / "runs/seed=5")
    file = root / "runs/seed=5/config.json"
    described = json.loads(file.read_text())
    described["config"]["model"] = {"family": "swin", "variant": "T"}
    file.write_text(json.dumps(described))
    table = results.load(root)
    assert "model.family" not in table and set(table["model.name"]) == {"vit", "swin"}
    assert set(table[table.run == "seed=5"]["model.name"]) == {"swin"}
    assert next(iter(results.read(root).labels().values())) == "vit A/14"
    shipped = ship(root, tmp_path / "s", "[{'model.name': 'vit'}]", {"model.name": "model.family"})
    assert "model.family" in pd.read_csv(shipped / "results.csv")
    assert set(results.load(shipped)["model.name"]) == {"vit", "swin"}


def test_labels_have_the_model_and_variant_bare() -> None:
    overrides = {"model.name": "vit", "model.variant": "A/7", "model.depth": 4, "train.seed": 1}
    assert results.point_label(overrides) == "vit A/7 depth=4"
    assert results.point_label({"evaluators.fd.name": "x"}) == "name=x"
    assert results.point_label({"train.seed": 1}) == "base"


def test_the_room_imports_no_jax(make_study: Callable[..., Path], tmp_path: Path) -> None:
    """Not even to make a report: a colleague's laptop need not have it."""
    make_study(tmp_path, sizes="A")
    code = (
        "import sys, pkgutil, importlib, scaling.study\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorflow', 'matplotlib'}\n"
        "names = [m.name for m in pkgutil.iter_modules(scaling.study.__path__)]\n"
        "assert {'charts', 'launch', 'launchers', 'pool', 'report', 'results', 'sweep'} <= set(names)\n"
        "for name in names:\n"
        "    importlib.import_module('scaling.study.' + name)\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
        "from scaling.study.report import report\n"
        f"report({str(tmp_path)!r})\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
