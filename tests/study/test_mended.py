"""What a study accepts when it is started again, and what is checked before anything is trained."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.study import launch, report, results
from tests.support.sweeps import BASE, load_dict, starts

ROOT = Path(__file__).parents[2]


def test_a_metric_that_nothing_measures_is_found_before_a_run_is_started(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"metric='fid': run seed=0 has no such metric; there are fd, other_loss"
    ):
        launch.sweep(study([0, 1], metric="fid"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_metrics_of_a_run_are_those_of_its_evaluators() -> None:
    metrics = launch.check_evaluators(str(ROOT / "tests/support/tiny_vit.py"), [])
    assert metrics == ("val_loss", "val_top1", "val_top1_se", "val_top5", "val_top5_se")


def test_a_study_that_has_not_begun_may_be_mended(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([15]), root) == 1  # ends before it has a status
    extra = ["train.duration=9 steps"]
    assert launch.sweep(study([15, 0], metric="other_loss"), root, extra_overrides=extra) == 1
    assert json.loads((root / "study.json").read_text())["metric"]["name"] == "other_loss"
    (root / "runs/seed=0/checkpoints/4").mkdir(parents=True)
    with pytest.raises(UserError, match="holds another study"):
        launch.sweep(study([15, 0]), root, extra_overrides=extra)


def _with_evaluators(**evaluators: Any) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    return lambda source, overrides: load_dict(source, overrides, {**BASE, "evaluators": evaluators})


def test_other_evaluators_are_the_same_study(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is done is opened again for an evaluator that has not measured it."""
    root, file = tmp_path / "w", study([0])
    monkeypatch.setattr(launch, "load_config", _with_evaluators(fd={"every": "25 %"}))
    assert launch.sweep(file, root) == 0
    monkeypatch.setattr(launch, "load_config", _with_evaluators(fd={"every": "50 %"}))
    assert launch.sweep(file, root) == 0 and len(starts(root, "runs/seed=0")) == 1
    late = _with_evaluators(fd={"every": "50 %"}, late={"every": "50 %"}, watched={"in_training": False})
    monkeypatch.setattr(launch, "load_config", late)
    assert launch.sweep(file, root) == 0 and len(starts(root, "runs/seed=0")) == 2
    assert starts(root, "runs/seed=0")[1]["step"] == 4  # nothing is trained again


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"config": 3}', '{"config": {}, "cost": {}}'])
def test_a_row_stays_without_its_runs_config(
    make_study: Callable[..., Path], tmp_path: Path, content: str | None
) -> None:
    root = make_study(tmp_path / "w", sizes="AF")
    before = results.read(root)
    damaged = root / "runs/variant=A-7_seed=0/config.json"
    damaged.unlink() if content is None else damaged.write_text(content)
    folder = results.read(root)
    assert len(folder.table) == len(before.table)
    (row, *_) = folder.table[folder.table.run == "variant=A-7_seed=0"].to_dict("records")
    assert row["gmacs"] != row["gmacs"] and row["fd_mnist"] > 0 and row["model.variant"] == "A/7"
    (run,) = [run for run in folder.runs if run.status != "done"]
    assert run.status == "broken" and "config.json" in str(run.reason)
    page, said = report.report(root).read_text(), report.summary_table(root)
    assert "config.json" in page and "broken: variant=A-7_seed=0: " in said and "F/4" in said
    assert folder.table.gmacs.notna().sum() == len(before.table) - 4


@pytest.mark.parametrize("lost", ["status.json", "metrics.jsonl"])
@pytest.mark.parametrize("unreadable", [False, True])
def test_what_a_run_has_lost_is_said(
    make_study: Callable[..., Path], tmp_path: Path, lost: str, unreadable: bool
) -> None:
    root = make_study(tmp_path / "w", sizes="AF")
    (root / "runs/variant=A-7_seed=0" / lost).unlink()
    if unreadable:
        (root / "runs/variant=A-7_seed=0" / lost).mkdir()
    (run,) = [run for run in results.read(root).runs if run.status != "done"]
    assert run.name == "variant=A-7_seed=0" and run.status == "broken" and lost in str(run.reason)


@pytest.mark.parametrize("content", ["[1]", "null", "{", "{}", '{"runs": [1]}'])
def test_a_study_json_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(UserError, match=r"study\.json: "):
        results.read(tmp_path)
