"""The charts' specifications: what is on which axis, the numbers drawn, one chart for still and page."""

import json
import re
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scaling.study import charts, laws, report, results
from scaling.study.plot_data import envelope, ramp, view
from tests.study.conftest import split_in_families

METRIC_AXIS = "fd_mnist (lower is better)"
Spec = dict[str, Any]


@pytest.fixture(scope="module")
def folder(make_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> results.StudyFolder:
    root = make_study(tmp_path_factory.mktemp("charts"), seeds=(0, 1), schedule="constant")
    return results.read(root)


@pytest.fixture(scope="module")
def fitted(folder: results.StudyFolder) -> dict[str, Any]:
    return laws.fit_laws(folder)


@pytest.fixture(scope="module")
def specs(folder: results.StudyFolder, fitted: dict[str, Any]) -> dict[str, Spec]:
    return {name: chart.to_dict() for name, chart in charts.build(folder, fitted).items()}


def marked(spec: Spec, mark: str) -> list[Spec]:
    return [layer for layer in spec["layer"] if layer["mark"]["type"] == mark]


def drawn(layer: Spec, x: str, y: str) -> list[tuple[float, float]]:
    """Returns the points of a layer after checking which columns are on its axes."""
    assert (layer["encoding"]["x"]["field"], layer["encoding"]["y"]["field"]) == (x, y)
    return sorted((row[x], row[y]) for row in layer["data"]["values"])


def pairs(table: pd.DataFrame, x: str, y: str) -> list[tuple[float, float]]:
    return sorted(zip(table[x], table[y], strict=True))


def test_every_chart_is_built(specs: dict[str, Spec]) -> None:
    assert list(specs) == ["metric_gmacs", "metric_compute", "slices"]
    assert [panel["title"]["text"] for panel in specs["slices"]["hconcat"]] == [
        "patch alone", "depth alone", "width alone",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "column", "title"),
    [
        ("metric_gmacs", "gmacs", "forward multiply-adds per example (gmacs)"),
        ("metric_compute", "train_flops", "training compute (FLOPs)"),
    ],
)
def test_compute_is_across_and_the_metric_up_both_on_log_scales(
    specs: dict[str, Spec], name: str, column: str, title: str
) -> None:
    layers = [layer["encoding"] for layer in specs[name]["layer"]]
    assert len(layers) >= 4
    for encoding in layers:
        assert (encoding["x"]["field"], encoding["x"]["title"]) == (column, title)
        assert encoding["y"]["field"] in ("y", "low", "run_low") and encoding["y"]["title"] == METRIC_AXIS
        for axis in ("x", "y"):
            assert encoding[axis]["scale"]["type"] == "log"
            assert encoding[axis]["scale"] == layers[0][axis]["scale"]
    for axis in ("x", "y"):
        low, high = layers[0][axis]["scale"]["domain"]
        ticks = layers[0][axis]["axis"]["values"]
        assert len(ticks) >= 3 and low <= min(ticks) and max(ticks) <= high


def test_points_are_the_tables_means_at_the_last_step(
    folder: results.StudyFolder, specs: dict[str, Spec]
) -> None:
    last = folder.table[folder.table.step == 800].groupby("model.variant", as_index=False)
    means = last.agg(gmacs=("gmacs", "first"), y=("fd_mnist", "mean"))
    (points,) = marked(specs["metric_gmacs"], "point")
    np.testing.assert_allclose(drawn(points, "gmacs", "y"), pairs(means, "gmacs", "y"), rtol=1e-12)
    (ranges,) = marked(specs["metric_gmacs"], "rule")
    lowest = last.agg(gmacs=("gmacs", "first"), low=("fd_mnist", "min"))
    np.testing.assert_allclose(drawn(ranges, "gmacs", "low"), pairs(lowest, "gmacs", "low"), rtol=1e-12)
    assert ranges["encoding"]["y2"]["field"] == "high"


def test_curves_are_the_tables_means_at_every_step(
    folder: results.StudyFolder, specs: dict[str, Spec]
) -> None:
    steps = folder.table.groupby(["model.variant", "step"], as_index=False)
    means = steps.agg(train_flops=("train_flops", "first"), y=("fd_mnist", "mean"))
    expected = pairs(means, "train_flops", "y")
    _, curves, frontier = marked(specs["metric_compute"], "line")
    for layer in (curves, *marked(specs["metric_compute"], "point")):
        np.testing.assert_allclose(drawn(layer, "train_flops", "y"), expected, rtol=1e-12)
    assert (curves["encoding"]["detail"]["field"], curves["encoding"]["order"]["field"]) == ("point", "step")
    edge = drawn(frontier, "train_flops", "y")
    assert {round(y, 6) for _, y in edge} <= {round(y, 6) for _, y in expected}
    assert all(before[1] > after[1] for before, after in pairwise(edge))
    for x, y in expected:
        assert min(bound for at, bound in edge if at <= x) <= y


def test_the_law_and_its_bands_are_the_fitted_ones_and_go_beyond_the_points(
    fitted: dict[str, Any], specs: dict[str, Spec]
) -> None:
    spec = specs["metric_gmacs"]
    wide, narrow = marked(spec, "area")
    line = marked(spec, "line")[0]
    (law,) = laws.law_in(fitted, "gmacs")
    curve = law["curve"]
    for layer, column, key in ((line, "y", "value"), (narrow, "low", "low"), (wide, "run_low", "run_low")):
        expected = sorted(zip(curve["x"], curve[key], strict=True))
        np.testing.assert_allclose(drawn(layer, "gmacs", column), expected)
    assert [band["encoding"]["y2"]["field"] for band in (wide, narrow)] == ["run_high", "high"]
    assert {row["line"] for row in narrow["data"]["values"]} == {charts.LAW_ENTRY}
    assert spec["title"]["subtitle"][0] == laws.describe(law)
    (points,) = marked(spec, "point")
    domain = line["encoding"]["x"]["scale"]["domain"]
    assert domain[1] > 4 * max(row["gmacs"] for row in points["data"]["values"])


def test_the_best_for_each_budget_is_drawn_where_durations_vary(
    fitted: dict[str, Any], specs: dict[str, Spec]
) -> None:
    line = marked(specs["metric_compute"], "line")[0]
    (law,) = laws.law_in(fitted, "examples")
    best = law["optimal"]
    expected = sorted(zip(best["train_flops"], best["y"]["value"], strict=True))
    np.testing.assert_allclose(drawn(line, "train_flops", "y"), expected)
    assert specs["metric_compute"]["title"]["subtitle"][0] == laws.describe(law)


def test_envelope() -> None:
    x, y = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([5.0, 9.0, 7.0, 6.0, 5.0])
    np.testing.assert_array_equal(envelope(x, y), [1, 3, 0])


def test_slices_have_the_varied_fact_across(folder: results.StudyFolder, specs: dict[str, Spec]) -> None:
    titles = {"patch": "patch size (pixels)", "depth": "depth (blocks)", "width": "width (channels)"}
    last = folder.table[folder.table.step == 800].groupby("model.variant").mean(numeric_only=True)
    for (varied, title), panel in zip(titles.items(), specs["slices"]["hconcat"], strict=True):
        (points,) = marked(panel, "point")
        for layer in (*marked(panel, "line"), points):
            x, y = layer["encoding"]["x"], layer["encoding"]["y"]
            assert (x["field"], x["title"], x["scale"]["type"]) == ("at", title, "log")
            assert (y["field"], y["title"], y["scale"]["type"]) == ("y", METRIC_AXIS, "log")
            assert x["scale"]["reverse"] == (varied == "patch")
        for row in points["data"]["values"]:
            assert (row["at"], row["y"]) == pytest.approx(tuple(last.loc[row["point"], [varied, "fd_mnist"]]))
        lines = [[row["at"] for row in layer["data"]["values"]] for layer in marked(panel, "line")]
        assert sorted(at for line in lines for at in line) == sorted(
            row["at"] for row in points["data"]["values"]
        )


def test_colours_are_sizes_and_markers_are_patches(specs: dict[str, Spec]) -> None:
    sizes = ["A: depth 2, width 16", "F: depth 2, width 32", "P: depth 4, width 32", "N: depth 4, width 64"]
    for spec in (specs["metric_gmacs"], specs["metric_compute"], *specs["slices"]["hconcat"]):
        (points,) = marked(spec, "point")
        colour, shape = points["encoding"]["color"], points["encoding"]["shape"]
        assert (colour["field"], colour["scale"]) == ("size", {"domain": sizes, "range": ramp(4)})
        shapes = {"domain": ["patch 14", "patch 7", "patch 4"], "range": ["circle", "square", "triangle-up"]}
        assert (shape["field"], shape["scale"]) == ("mark", shapes)
        assert colour["legend"] and shape["legend"]
        for row in points["data"]["values"]:
            assert (row["size"][0], row["mark"]) == (row["point"][0], f"patch {row['point'][2:]}")
        tips = {tip["field"] for tip in points["encoding"]["tooltip"]}
        assert {"point", "y", "gmacs", "train_flops", "params", "tokens", "depth", "width", "patch"} <= tips


def test_colours_go_from_light_to_dark() -> None:
    assert ramp(2) == ["#86d549", "#440154"] and ramp(1) == ["#86d549"] and len(set(ramp(12))) == 12
    light = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in ramp(7)]
    assert light == sorted(light, reverse=True)


# --- one chart for the still and for the page ----------------------------------------------------


def test_the_page_and_the_stills_show_the_same_chart(
    make_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the one chart that is built changes the PNG, the SVG and the page."""
    root = make_study(tmp_path, sizes="A")

    def outputs() -> tuple[Spec, str, bytes]:
        page = report.report(root).read_text()
        match = re.search(r"^const charts = (.*);$", page, re.MULTILINE)
        assert match
        stills = [root / f"charts/metric_gmacs.{ending}" for ending in ("svg", "png")]
        return json.loads(match[1])["metric_gmacs"], stills[0].read_text(), stills[1].read_bytes()

    first = outputs()
    assert outputs() == first  # the same data give the same files

    def build(*args: Any) -> dict[str, charts.Chart]:
        built = charts.build(*args)
        built["metric_gmacs"].title = alt.TitleParams("another title")
        return built

    monkeypatch.setattr(report, "build", build)
    second = outputs()
    assert second[0]["title"] == {"text": "another title"} != first[0]["title"]
    assert "another title" in second[1] and "another title" not in first[1]
    assert second[2] != first[2]


def test_the_pages_specification_only_widens_the_stills(
    folder: results.StudyFolder, fitted: dict[str, Any]
) -> None:
    for name, chart in charts.build(folder, fitted).items():
        still = charts.specification(chart)
        page = charts.page_spec(still)
        if name != "slices":
            assert (page.pop("width"), page.pop("autosize")["type"]) == ("container", "fit-x")
            assert still.pop("width") == charts.WIDTH
        assert page == still


def test_stills_are_sharp_and_legible(folder: results.StudyFolder, fitted: dict[str, Any]) -> None:
    chart = charts.build(folder, fitted)["metric_gmacs"]
    drawn = charts.svg(charts.specification(chart))
    pixels = np.asarray(Image.open(BytesIO(charts.png(drawn))))
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1200 and pixels.std() > 5
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    for text in (
        charts.GMACS,
        METRIC_AXIS,
        charts.LAW_ENTRY,
        "mean and range of seeds",
        "patch 7",
        "0.001",
    ):
        assert text in texts


# --- what the data decide ------------------------------------------------------------------------


def test_refuted_laws_are_dashed(folder: results.StudyFolder, fitted: dict[str, Any]) -> None:
    (law,) = laws.law_in(fitted, "gmacs")
    for reason, dashes in ((None, [1, 0]), ("it misses N/4", [6, 4])):
        spec = charts.metric_gmacs("s", view(folder), [{**law, "refutation": reason}]).to_dict()
        encoding = marked(spec, "line")[0]["encoding"]
        assert encoding["stroke"]["scale"]["domain"][0] == charts.LAW_ENTRY
        assert encoding["stroke"]["scale"]["range"][0] == charts.LAW
        assert encoding["strokeDash"]["scale"]["range"][0] == dashes
        assert ("refuted: it misses N/4" in spec["title"]["subtitle"][0]) == (reason is not None)


def test_a_band_without_end_leaves_the_points_readable(
    folder: results.StudyFolder, fitted: dict[str, Any]
) -> None:
    points, law = view(folder).last, json.loads(json.dumps(laws.law_in(fitted, "gmacs")[0]))
    for end, value in (("high", 1e6), ("low", 1e-6), ("run_high", 1e6), ("run_low", 1e-6)):
        law["curve"][end] = [value] * len(law["curve"]["x"])
    spec = charts.metric_gmacs("s", view(folder), [law]).to_dict()
    bottom, top = spec["layer"][-1]["encoding"]["y"]["scale"]["domain"]
    assert points.low.min() / 6 < bottom < points.low.min()
    assert points.high.max() < top < 6 * points.high.max()
    assert all(layer["mark"]["clip"] for layer in [*marked(spec, "area"), *marked(spec, "line")])


def test_known_errors_of_measurement_are_drawn(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.1, 0.004, 0.5))
    for file in root.glob("runs/*/metrics.jsonl"):
        file.write_text(file.read_text().replace('"val_top1"', '"val_top1_se": 0.01, "val_top1"'))
    folder = results.read(root)
    errors, _ = marked(charts.build(folder, laws.fit_laws(folder))["metric_gmacs"].to_dict(), "rule")
    for row in errors["data"]["values"]:
        assert (row["least"], row["most"]) == pytest.approx((row["y"] - 0.02, row["y"] + 0.02))


def test_families_have_a_law_each(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.1, 0.002, 0.5))
    split_in_families(root, "AF")
    folder = results.read(root)
    spec = charts.build(folder, laws.fit_laws(folder))["metric_gmacs"].to_dict()
    assert len(marked(spec, "area")) == 4 and len(marked(spec, "line")) == 2
    assert [text.partition(":")[0] for text in spec["title"]["subtitle"]] == ["gmacs, vit", "gmacs, swin"]


@pytest.mark.parametrize("floor", [60.0, 3.1])
def test_a_floor_is_a_labelled_line_or_where_that_is_too_low_a_note(
    make_study: Callable[..., Path], tmp_path: Path, floor: float
) -> None:
    root = make_study(tmp_path, seeds=(0,))
    for file in root.glob("runs/*/metrics.jsonl"):
        file.write_text(file.read_text().replace('"fd_mnist_floor": 3.1', f'"fd_mnist_floor": {floor}'))
    folder = results.read(root)
    spec = charts.build(folder, laws.fit_laws(folder))["metric_gmacs"].to_dict()
    notes = [text for text in spec["title"]["subtitle"] if text.startswith("real data against real data")]
    bottom = spec["layer"][-1]["encoding"]["y"]["scale"]["domain"][0]
    if floor == 60:
        (text,) = marked(spec, "text")
        lines = [rule for rule in marked(spec, "rule") if rule["data"] == text["data"]]
        assert [rule["encoding"]["y"]["field"] for rule in lines] == ["y"] and not notes
        assert text["data"]["values"] == [{"y": 60.0, "label": "real data against real data: 60"}]
        assert bottom < 60
    else:
        assert not marked(spec, "text") and bottom > 3.1
        assert notes == ["real data against real data: 3.1 (below this axis)"]


def test_an_accuracy_is_drawn_as_an_error(make_study: Callable[..., Path], tmp_path: Path) -> None:
    folder = results.read(make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5)))
    spec = charts.build(folder, laws.fit_laws(folder))["metric_gmacs"].to_dict()
    (points,) = marked(spec, "point")
    assert points["encoding"]["y"]["title"] == "1 - val_top1 (lower is better)"
    last = folder.table[folder.table.step == 800]
    expected = pairs(last.assign(y=1 - last.val_top1), "gmacs", "y")
    np.testing.assert_allclose(drawn(points, "gmacs", "y"), expected, rtol=1e-12)


def test_models_without_depth_width_or_patch(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path)
    for file in root.glob("runs/*/config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "model": {}}))
    folder = results.read(root)
    built = charts.build(folder, laws.fit_laws(folder))
    assert set(built) == {"metric_gmacs", "metric_compute"}
    (points,) = marked(built["metric_gmacs"].to_dict(), "point")
    assert points["encoding"]["shape"]["legend"] is None


def test_no_results_draw_nothing(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, sizes="A")
    for file in root.glob("runs/*/metrics.jsonl"):
        file.unlink()
    folder = results.read(root)
    assert charts.build(folder, laws.fit_laws(folder)) == {}


def test_the_range_of_seeds_is_in_the_legend_without_a_law_too(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    few = results.read(make_study(tmp_path, sizes="A", seeds=(0, 1)))
    fitted = laws.fit_laws(few)
    assert all("reason" in law for law in fitted["laws"] if law["law"] == "gmacs")
    spec = charts.build(few, fitted)["metric_gmacs"].to_dict()
    (line,) = marked(spec, "line")
    assert line["encoding"]["stroke"]["scale"]["domain"] == ["mean and range of seeds"]
