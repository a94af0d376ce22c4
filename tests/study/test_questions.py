"""Questions to studies whose law is known: predictions, advice, comparisons."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling import cli
from scaling.errors import UserError
from scaling.study import question, results
from scaling.study.advise import advise
from scaling.study.compare import compare
from scaling.study.evidence import evidence
from scaling.study.laws import laws_of
from scaling.study.predict import predict
from tests.study.conftest import macs, split_in_families

MakeStudy = Callable[..., Path]
E, A, ALPHA = 20.0, 8.0, 0.4


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "COUNT", (sys.executable, "-m", "tests.support.fake_count"))


@pytest.fixture(scope="module")
def study(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study without its largest size."""
    root = tmp_path_factory.mktemp("questions")
    return make_study(root, seeds=(0, 1), noise=0.01, law=(E, A, ALPHA), sizes="AFP")


def truth(depth: int, width: int, patch: int) -> float:
    return float(E + A * macs(depth, width, patch)[1] ** -ALPHA)


# --- predict ---


def test_a_larger_size_is_predicted_with_a_verdict(study: Path) -> None:
    asked = {"model.variant": "N/4"}
    answer = predict(study, asked, seeds=2, tolerance=0.2)
    assert answer["low"] < truth(4, 64, 4) < answer["high"]
    assert answer["verdict"] == "predicted" and "within 20%" in answer["reason"]
    assert answer["facts"]["gmacs"] == macs(4, 64, 4)[1] and answer["overrides"] == {"model.variant": "N/4"}
    assert 1 < max(answer["beyond"].values()) < 5
    narrow = predict(study, asked, tolerance=0.001)
    assert narrow["verdict"] == "too wide" and "see scaling advise" in narrow["reason"]
    one = predict(study, asked)
    assert one["high"] - one["low"] > answer["high"] - answer["low"]


def test_the_rest_is_as_in_the_largest_configuration(study: Path) -> None:
    answer = predict(study, {"model.width": 48})
    assert answer["overrides"] == {"model.variant": "P/4", "model.width": 48}
    assert answer["low"] < truth(4, 48, 4) < answer["high"]


def test_an_accuracy_is_predicted_as_such(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5), noise=0.01, sizes="AFP")
    answer = predict(root, {"model.variant": "N/4"})
    assert answer["low"] < 1 - (0.02 + 0.004 * macs(4, 64, 4)[1] ** -0.5) < answer["high"] < 1


def test_a_refuted_law_predicts_nothing(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, noise=0.005, law=(1.0, A, ALPHA))
    for run in ("N-4", "N-7", "P-4"):
        file = root / f"runs/variant={run}_seed=0/metrics.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()]
        events[-1]["values"]["fd_mnist"] *= 3
        file.write_text("".join(json.dumps(event) + "\n" for event in events))
    answer = predict(root, {"model.width": 128}, tolerance=0.9)
    assert answer["verdict"] == "refuted" and answer["reason"]


def test_another_duration_takes_a_law_of_durations(
    study: Path, make_study: MakeStudy, tmp_path: Path
) -> None:
    asked = {"train.duration": "3200 steps"}
    with pytest.raises(UserError, match=r"^204,800 examples: every value of the study"):
        predict(study, asked)
    constant = make_study(tmp_path, noise=0.01, law=(E, A, ALPHA), schedule="constant")
    answer = predict(constant, asked)
    assert answer["law"] == "gmacs and examples" and answer["beyond"]["examples"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (
            {"optimizer.learning_rate": 1.0},
            r"^optimizer\.learning_rate=1\.0: no law has it as a quantity, and the runs have 0\.001; ask for",
        ),
        ({"model.variant": "N/5"}, r"^model\.variant='N/5': no such variant"),
    ],
)
def test_what_no_law_covers_is_one_line(study: Path, asked: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        predict(study, asked)


def test_a_study_that_nobody_measured_is_one_line(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, sizes="A")
    described = json.loads((root / "study.json").read_text())
    described["metric"] = {"name": "val_top1"}
    (root / "study.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"no run has been evaluated for val_top1; the table has fd_mnist"):
        predict(root, {})


def test_what_a_configuration_costs_is_counted_from_its_real_config(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question, "COUNT", (sys.executable, "-m", "scaling.training.count"))
    folder = results.read(study)
    (tiny,) = question.ask(folder, [{"model.variant": "A/14"}])
    assert tiny.facts["tokens"] == 4 and tiny.facts["examples"] % 64 == 0
    assert tiny.facts["train_flops"] > 6e9 * 0.5 * tiny.facts["gmacs"] * tiny.facts["examples"]
    assert question.ask(folder, [{"optimizer.learning_rate": 0.01}])  # as the runs have it
    with pytest.raises(UserError, match=r"^optimizer\.learning_rate=0\.02: no law has it as a quantity"):
        question.ask(folder, [{"optimizer.learning_rate": 0.02}])
    with pytest.raises(UserError, match=r"^model\.variannt: .*model\.variant"):
        question.ask(folder, [{"model.variannt": "A/14"}])


# --- advise ---


def test_advice_fits_the_hours_and_narrows_more_with_each_run(study: Path) -> None:
    hours = sum(results.read(study).table.groupby("run")["hours"].max()) / 2
    advice = advise(study, hours, {"model.variant": "N/4"})
    assert advice and sum(run["hours"] for run in advice) <= hours
    shrinkage = [run["shrinkage"] for run in advice]
    assert shrinkage == sorted(shrinkage) and shrinkage[0] > 0 and shrinkage[-1] < 1
    seeds = [json.dumps(run["overrides"], sort_keys=True) for run in advice]
    assert len(set(seeds)) == len(seeds)
    assert 2 in {run["overrides"]["train.seed"] for run in advice}  # 0 and 1 are there
    more = advise(study, 4 * hours, {"model.variant": "N/4"})
    assert more[: len(advice)] and more[-1]["shrinkage"] > shrinkage[-1]
    assert advise(study, 1e-9) == []


def test_combinations_of_values_that_make_no_model_are_left_out(study: Path, tmp_path: Path) -> None:
    root = tmp_path / "w"
    shutil.copytree(study, root)
    described = json.loads((root / "study.json").read_text())
    for name, overrides in described["runs"].items():
        size, patch = overrides["model.variant"].split("/")
        overrides["model.width"] = {"A": 16, "F": 32, "P": 32}[size]
        if name.startswith("variant=P-4"):
            overrides["model.variant"] = f"{size}/{patch}"
    described["runs"]["extra"] = {"model.variant": "P/5", "model.width": 8, "train.seed": 0}  # P/5 is none
    (root / "study.json").write_text(json.dumps(described))
    advice = advise(root, 1e9, {"model.width": 64})
    names = {(run["overrides"]["model.variant"], run["overrides"]["model.width"]) for run in advice}
    assert advice and all(not variant.endswith("/5") for variant, _ in names)


def test_candidates_may_be_those_of_another_study_file(study: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.py"
    file.write_text(
        "from scaling.study.sweep import Study, product\n"
        "STUDY = Study(name='s', config='c.py', sweep=product({'model.variant': ['N/4', 'N/7', 'P/4']}), "
        "metric='fd_mnist')\n"
    )
    advice = advise(study, 10.0, {"model.variant": "N/4"}, candidates=file)
    variants = [run["overrides"]["model.variant"] for run in advice]
    assert {"N/4", "N/7"} & set(variants)
    first = next(run for run in advice if run["overrides"]["model.variant"] == "N/4")
    assert first["overrides"]["train.seed"] == 0


def test_a_run_narrows_the_interval_as_promised(study: Path, tmp_path: Path) -> None:
    """By what reweighting the posterior's draws gives, over what the run may measure."""
    file = tmp_path / "one.py"
    file.write_text(
        "from scaling.study.sweep import Study\n"
        "STUDY = Study(name='s', config='c.py', sweep=[{'model.variant': 'N/7'}], metric='fd_mnist')\n"
    )
    asked = {"model.variant": "N/4"}
    advice = advise(study, 1e9, asked, candidates=file)
    (promised,) = [
        now["shrinkage"] - before
        for before, now in zip([0.0, *(run["shrinkage"] for run in advice)], advice, strict=False)
        if now["overrides"] == {"model.variant": "N/7", "train.seed": 0}
    ]
    assert advice[0]["overrides"]["model.variant"] == "N/7", "the first, so that nothing comes before it"
    folder = results.read(study)
    (there,) = question.ask(folder, [asked])
    (new,) = question.ask(folder, [{"model.variant": "N/7"}])
    law = question.choose(laws_of(evidence(folder)), there)
    assert law.belief is not None
    q, c = np.log(law.belief.curve(np.concatenate([there.x(law), new.x(law)]))).T
    noise = sum(np.mean(draws**2) for draws in law.belief.posteriors[0].spread.values())
    measured = c + np.sqrt(noise) * np.random.default_rng(0).normal(size=len(c))
    weights = np.exp(-0.5 * (measured[:, None] - c) ** 2 / noise)
    weights /= weights.sum(1, keepdims=True)
    left = (weights @ q**2 - (weights @ q) ** 2).mean()
    expected = 1 - np.sqrt((left + noise) / (q.var() + noise))
    assert promised > 0.02 and promised == pytest.approx(expected, abs=0.05)


def test_advice_without_hours_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no run tells how long it took; advise needs the folders"):
        advise(Path(__file__).parents[2] / "experiments/mnist_dit", 2.0)


# --- compare ---


def test_the_better_of_two_studies_is_named_with_what_it_is_worth(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    first = make_study(tmp_path / "a", noise=0.005, law=(1.0, 4.0, 0.4), seeds=(0, 1))
    second = make_study(tmp_path / "b", noise=0.005, law=(1.0, 6.0, 0.4), seeds=(0, 1))
    (pair,) = compare([first, second])
    assert pair["better"] == str(first) == pair["first"]
    for row in pair["at"]:
        term = row["gmacs"] ** -0.4
        assert row["ratio"]["low"] < (1 + 4 * term) / (1 + 6 * term) < row["ratio"]["high"]
        assert row["probability"] > 0.99
    worth = pair["at"][1]["worth"]
    assert worth["low"] < 1.5 ** (1 / 0.4) < worth["high"]
    (other,) = compare([second, first])
    assert other["better"] == str(first) and other["at"][1]["probability"] < 0.01
    (same,) = compare([first, first])
    assert same["better"] is None and same["at"][1]["ratio"]["value"] == pytest.approx(1, abs=0.02)


def test_families_of_one_study_are_compared(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.1, 0.002, 0.5))
    split_in_families(root, "AP")
    (pair,) = compare([root])
    assert (pair["first"], pair["second"]) == ("vit", "swin")


def test_studies_that_cannot_be_compared_are_one_line(make_study: MakeStudy, tmp_path: Path) -> None:
    one = make_study(tmp_path / "a")
    other = make_study(tmp_path / "b", metric="val_top1", law=(0.1, 0.002, 0.5))
    with pytest.raises(UserError, match=r"one study of one family; give another to compare it with"):
        compare([one])
    with pytest.raises(UserError, match=r"the metrics differ: 1 - val_top1, fd_mnist"):
        compare([one, other])
    with pytest.raises(UserError, match=r"no law to compare by: none is in train_flops"):
        compare([one, one], "train_flops")


# --- the commands ---


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["predict", "--config.model.variant=N/4", "--tolerance=20%", "--seeds=3"], "verdict"),
        (["advise", "--hours=1", "--config.model.variant=N/4"], "shrinkage"),
    ],
)
def test_the_commands_print_text_or_json(
    study: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], key: str
) -> None:
    assert cli.main([*arguments, str(study)]) == 0
    said = capsys.readouterr().out
    assert "fd_mnist" in said or "narrower by" in said
    assert cli.main([*arguments, str(study), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert key in (answer[0] if isinstance(answer, list) else answer)


def test_comparing_prints_text_or_json(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(study), str(study)]) == 0
    assert "neither is surely better" in capsys.readouterr().out
    assert cli.main(["compare", str(study), str(study), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["better"] is None
