"""Tuning: a rate is chosen on the smallest configurations, carried on, and is no configuration of a law."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.study import launch, results
from scaling.study.evidence import evidence
from scaling.study.laws import laws_of
from scaling.study.plot_data import view
from scaling.study.sweep import Study, product
from scaling.study.tuning import Tune
from tests.support.sweeps import starts

RATE = "optimizer.learning_rate"
STUDY = (
    "from scaling.study.sweep import Study, product\nfrom scaling.study.tuning import Tune\n"
    "STUDY = Study(name='s', config='c.py', metric='fd', tune=Tune('optimizer.learning_rate', {values}),\n"
    "    sweep=product({{'model.variant': ['L', 'M', 'S'], 'train.seed': {seeds}}}))\n"
)


@pytest.fixture
def tuned(study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def gmacs(source: str, overrides: dict[str, Any]) -> float:
        return {"S": 1.0, "M": 2.0, "L": 3.0}[overrides["model.variant"]]

    monkeypatch.setattr(launch, "count_gmacs", gmacs)

    def write(values: str = "[0.001, 0.01, 0.1]", seeds: str = "[0, 1]") -> Path:
        file = study([0])
        file.write_text(STUDY.format(values=values, seeds=seeds))
        return file

    return write


def rates(root: Path) -> dict[tuple[str, int, float], int]:
    """How often each run started, by variant, seed and rate."""
    found = {}
    for folder in sorted((root / "runs").iterdir()):
        begun = starts(root, f"runs/{folder.name}")
        pairs = begun[0]["pairs"]
        key = (pairs["model.variant"], int(pairs["train.seed"]), float(pairs[RATE]))
        found[key] = len(begun)
    return found


def test_the_best_rate_of_the_smallest_is_carried_to_all(
    tuned: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "w"
    assert launch.sweep(tuned(), root) == 0
    assert (
        "optimizer.learning_rate=0.01, the best of 0.001, 0.01, 0.1 (smallest 2)" in capsys.readouterr().out
    )
    tries = {(size, 0, rate): 1 for size in "SM" for rate in (0.001, 0.01, 0.1)}
    rest = {(size, seed, 0.01): 1 for size in "LMS" for seed in (0, 1)}
    assert rates(root) == {**tries, **rest}  # what tuning has made is not made again
    assert launch.sweep(tuned(seeds="[0, 1, 2]"), root) == 0
    assert rates(root) == {**tries, **rest, **{(size, 2, 0.01): 1 for size in "LMS"}}


def test_another_best_changes_what_is_carried(tuned: Callable[..., Path], tmp_path: Path) -> None:
    assert launch.sweep(tuned("[0.1, 1.0]", "[0]"), tmp_path / "w") == 0
    assert ("L", 0, 0.1) in rates(tmp_path / "w") and ("L", 0, 1.0) not in rates(tmp_path / "w")


def test_a_swept_rate_is_no_configuration(tuned: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(tuned(), root) == 0
    folder = results.read(root)
    found = evidence(folder)
    assert set(found.table.point) == {"L", "M", "S"} and len(found.table) == 6
    assert sorted(text.partition(": ")[2] for text in found.left_out if "tuning" in text) == (
        ["tuning: learning_rate=0.01 was carried on"] * 4
    )
    assert set(view(folder).last.point) == {"L", "M", "S"} and len(view(folder).curves) == 24


def test_each_configuration_counts_with_its_best_rate(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    """In a plain sweep of rates, where nothing was carried on."""
    root = make_study(tmp_path, seeds=(0, 1, 2), noise=0.01)
    described = json.loads((root / "study.json").read_text())
    for name, overrides in described["runs"].items():
        seed = overrides.pop("train.seed")
        overrides[RATE] = (0.01, 0.001, 0.1)[seed]
        file = root / f"runs/{name}/metrics.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        for event in events:
            if "fd_mnist" in event["values"]:
                event["values"]["fd_mnist"] *= (1.0, 1.5, 2.0)[seed]
        file.write_text("".join(json.dumps(event) + "\n" for event in events))
    (root / "study.json").write_text(json.dumps(described))
    found = evidence(results.read(root))
    assert len(found.table) == 12 and all("_seed=0" in run for run in found.table.run)
    assert sum("tuning: learning_rate=0.01 was better" in text for text in found.left_out) == 24
    law = laws_of(found)[0]
    assert law.belief is not None and law.refutation is None


def test_the_choice_is_of_the_mean_over_configurations_that_have_all() -> None:
    tune = Tune(RATE, (0.1, 0.2))
    runs = {f"{size}{rate}": {"m.size": size, RATE: rate} for size in "ab" for rate in (0.1, 0.2)}
    assert tune.chosen({"a0.1": 1.0, "b0.1": 8.0, "a0.2": 2.0, "b0.2": 3.0}, runs) == 0.2
    assert tune.chosen({"a0.1": 1.0, "b0.1": 8.0, "a0.2": 0.1}, runs) == 0.1  # b failed at 0.2
    with pytest.raises(UserError, match=r"none of its values was measured in every configuration"):
        tune.chosen({"a0.1": 1.0, "b0.2": 8.0}, runs)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((RATE, (0.1,)), r"tune optimizer\.learning_rate: values=\(0\.1,\): must be at least two"),
        ((RATE, (0.1, 0.1)), r"must be at least two different ones"),
        ((RATE, (0.1, 0.2), "largest"), r"at='largest': must be 'smallest N'"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments: tuple, error: str) -> None:
    with pytest.raises(UserError, match=error):
        Tune(*arguments)


def test_what_is_tuned_is_not_swept_as_well() -> None:
    with pytest.raises(UserError, match=r"^study s: tune optimizer\.learning_rate: is swept as well"):
        Study("s", "c.py", product({RATE: [0.1, 0.2]}), "fd", tune=Tune(RATE, (0.1, 0.2)))
