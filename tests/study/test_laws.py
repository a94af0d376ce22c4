"""The laws of study folders whose law is known: what counts, what is found, what is refuted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.study import results
from scaling.study.evidence import evidence
from scaling.study.laws import describe, fit_laws, law_in, laws_of, named
from tests.study.conftest import split_in_families

E, A, ALPHA = 20.0, 8.0, 0.4
MakeStudy = Callable[..., Path]


def change(root: Path, run: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the last evaluation of a run."""
    file = root / f"runs/variant={run}_seed=0/metrics.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    change(events[-1]["values"])
    file.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_study_has_its_law_and_predicts_its_largest_runs(make_study: MakeStudy, tmp_path: Path) -> None:
    fitted = fit_laws(results.read(make_study(tmp_path, seeds=(0, 1), noise=0.01, law=(E, A, ALPHA))))
    assert fitted["fitted"] == "fd_mnist" and fitted["metric"]["kind"] == "distance"
    assert fitted["spearman"] < -0.95 and fitted["pearson"] < -0.95
    (law,) = law_in(fitted, "gmacs")
    assert (law["values"], law["form"], law["refutation"]) == (24, "power", None)
    low, high = law["intervals"]["alpha"]
    assert low < ALPHA < high and high - low < 0.15
    assert describe(law).startswith("exponent 0.") and "E = " in describe(law)
    predictions = law["held_out"]["predictions"]
    assert [p["point"] for p in predictions] == ["N/7", "N/4"]
    assert all(p["low"] < p["actual"] < p["high"] for p in predictions)
    assert len(law["residuals"]) == 24 and max(abs(r["residual"]) for r in law["residuals"]) < 0.06
    assert 0 < law["doubling"]["low"] < law["doubling"]["value"] < law["doubling"]["high"] < 0.5


def test_the_curve_goes_beyond_the_largest_run_and_holds_the_law_there(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    folder = results.read(make_study(tmp_path, seeds=(0, 1), noise=0.01, law=(E, A, ALPHA)))
    (law,) = law_in(fit_laws(folder), "gmacs")
    curve = {name: np.array(values) for name, values in law["curve"].items()}
    assert curve["x"][-1] == pytest.approx(4 * folder.table.gmacs.max())
    truth = E + A * curve["x"] ** -ALPHA
    assert (curve["low"] < truth)[-1] and (truth < curve["high"])[-1]
    assert (curve["run_low"] < curve["low"]).all() and (curve["high"] < curve["run_high"]).all()


def test_an_accuracy_is_fitted_as_an_error(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5), noise=0.01)
    fitted = fit_laws(results.read(root))
    assert fitted["fitted"] == "1 - val_top1"
    (law,) = law_in(fitted, "gmacs")
    assert law["intervals"]["alpha"][0] < 0.5 < law["intervals"]["alpha"][1]


def test_only_annealed_values_count(make_study: MakeStudy, tmp_path: Path) -> None:
    """With a decaying rate the last of each run; with a constant one all, which gives a law of durations."""
    decaying = results.read(make_study(tmp_path / "a", law=(E, A, ALPHA)))
    found = evidence(decaying)
    assert len(found.table) == 12 and set(found.table.step) == {800}
    assert found.left_out[0].endswith(": 3 values from before the end of its learning rate's schedule")
    assert [law.name for law in laws_of(found)] == ["gmacs", "tokens"]
    constant = results.read(make_study(tmp_path / "b", law=(E, A, ALPHA), schedule="constant"))
    found = evidence(constant)
    assert len(found.table) == 48 and not found.left_out
    laws = {law.name: law for law in laws_of(found)}
    assert list(laws) == ["gmacs", "tokens", "examples"]
    assert len(laws["gmacs"].table) == 12 and len(laws["examples"].table) == 48
    assert laws["examples"].cost == pytest.approx(6e9)


def test_the_compute_optimal_frontier_is_that_of_the_law(
    make_study: MakeStudy, make_run: Callable[..., None], tmp_path: Path
) -> None:
    """Values E + N^-a + D^-b with a known exponent of training compute, a b / (a + b)."""
    root = make_study(tmp_path, schedule="constant")
    rng = np.random.default_rng(0)
    for file in root.glob("runs/*/metrics.jsonl"):
        gmacs = json.loads((file.parent / "config.json").read_text())["cost"]["gmacs"]
        events = [json.loads(line) for line in file.read_text().splitlines()]
        for event in events:
            event["step"] = max(8, event["step"] ** 2 // 800)  # 50 to 800
            size, data = gmacs / 0.01, 64 * event["step"] / 5e4
            y = 0.5 + size**-0.5 + data**-0.4
            event["values"] = {"fd_mnist": y * np.exp(0.01 * rng.normal())}
        file.write_text("".join(json.dumps(event) + "\n" for event in events))
    (law,) = law_in(fit_laws(results.read(root)), "examples")
    exponent = law["optimal"]["exponents"]["y"]
    assert exponent["low"] < 0.5 * 0.4 / 0.9 < exponent["high"]
    best = law["optimal"]
    product = np.multiply(best["gmacs"]["value"], best["examples"]["value"]) * best["cost"]
    np.testing.assert_allclose(product, best["train_flops"], rtol=0.02)


def test_a_run_of_many_values_gives_eight_to_the_law_of_examples(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    root = make_study(tmp_path, schedule="constant", sizes="AF")
    for file in root.glob("runs/*/metrics.jsonl"):
        events = [json.loads(line) for line in file.read_text().splitlines()]
        last = events[-1]
        many = [{**last, "step": step, "values": {"fd_mnist": 100 / step + 5}} for step in range(8, 801, 8)]
        file.write_text("".join(json.dumps(event) + "\n" for event in many))
    laws = {law.name: law for law in laws_of(evidence(results.read(root)))}
    for _, rows in laws["examples"].table.groupby("run"):
        assert len(rows) == 8 and rows.examples.max() == 64 * 800 and rows.examples.min() == 64 * 8
        ratios = np.diff(np.log(rows.examples))
        assert ratios.max() < 1.5 * ratios.min()


def test_a_law_that_breaks_is_refuted(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, noise=0.005, law=(1.0, A, ALPHA))
    for run in ("N-4", "N-7"):
        change(root, run, lambda values: values.update(fd_mnist=2.5 * values["fd_mnist"]))
    (law,) = law_in(fit_laws(results.read(root)), "gmacs")
    assert law["refutation"] and describe(law).endswith(f"; refuted: {law['refutation']}")


def test_what_is_left_out_is_listed_with_its_reason(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path)
    change(root, "A-14", lambda values: values.update(fd_mnist=0.0))
    change(root, "A-7", lambda values: values.pop("fd_mnist"))
    change(root, "F-4", lambda values: values.update(fd_mnist=float("nan")))
    failed = root / "runs/variant=F-7_seed=0/status.json"
    failed.write_text(json.dumps({**json.loads(failed.read_text()), "status": "failed", "reason": "is NaN"}))
    found = evidence(results.read(root))
    assert {"A/14", "A/7", "F/4", "F/7"}.isdisjoint(found.table.point) and len(found.table) == 8
    texts = dict(text.split(": ", 1) for text in found.left_out)
    assert texts["variant=F-7_seed=0"] == "failed, is NaN"
    assert texts["variant=A-14_seed=0"].endswith("fd_mnist=0 at step 800, whose fd_mnist has no logarithm")
    assert texts["variant=A-7_seed=0"] == texts["variant=F-4_seed=0"] == "no fd_mnist at its last step, 800"


def test_families_have_laws_of_their_own(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.1, 0.002, 0.5))
    split_in_families(root, "AF")
    laws = law_in(fit_laws(results.read(root)), "gmacs")
    assert {law["group"]: law["values"] for law in laws} == {"vit": 6, "swin": 6}
    assert {named(law) for law in laws} == {"gmacs, vit", "gmacs, swin"}


def test_durations_do_not_mix_in_a_law_of_gmacs(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path)
    study = json.loads((root / "study.json").read_text())
    for name in list(study["runs"])[:3]:
        file = root / f"runs/{name}/config.json"
        config = json.loads(file.read_text())
        config["config"]["data"]["batch_size"] = 32
        file.write_text(json.dumps(config))
    laws = {law.name: law for law in laws_of(evidence(results.read(root)))}
    assert len(laws["gmacs"].table) == 9 and set(laws["gmacs"].table.examples) == {64 * 800}
    assert len(laws["examples"].table) == 12


def test_known_errors_of_measurement_are_used(make_study: MakeStudy, tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.1, 0.002, 0.5))
    for file in root.glob("runs/*/metrics.jsonl"):
        file.write_text(file.read_text().replace('"val_top1"', '"val_top1_se": 0.02, "val_top1"'))
    found = evidence(results.read(root))
    assert set(found.table.error) == {0.02}
    (gmacs, _) = laws_of(found)
    assert gmacs.belief is not None
    np.testing.assert_allclose(gmacs.belief.values.known, 0.02 / gmacs.belief.values.y)


def test_a_known_floor_is_the_least_that_a_law_falls_to(make_study: MakeStudy, tmp_path: Path) -> None:
    folder = results.read(make_study(tmp_path, noise=0.01, law=(3.3, 0.2, 0.6)))
    (law,) = law_in(fit_laws(folder), "gmacs")
    assert 3.1 <= law["intervals"]["E"][0] < 3.3 < law["intervals"]["E"][1]  # real data have 3.1


def test_few_points_say_so(make_study: MakeStudy, tmp_path: Path) -> None:
    fitted = fit_laws(results.read(make_study(tmp_path, sizes="A")))
    (law,) = law_in(fitted, "gmacs")
    assert describe(law) == "no law: form='power': 3 different configurations, and it needs 4; train more"
