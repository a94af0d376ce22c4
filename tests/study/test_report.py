"""The report: complete, self-contained, and honest about what is missing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaling.errors import UserError
from scaling.study import laws, results
from scaling.study.plot_data import per_doubling, slices, view
from scaling.study.report import report, summary_table
from scaling.study.samples import gallery
from scaling.study.summary import answers


@pytest.fixture(scope="module")
def study(make_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_study(tmp_path_factory.mktemp("study"), seeds=(0, 1), samples=True)
    report(root)
    return root


def specifications(page: str) -> dict[str, dict]:
    match = re.search(r"^const charts = (.*);$", page, re.MULTILINE)
    assert match
    return json.loads(match[1])


def test_files(study: Path) -> None:
    assert (study / "results.csv").is_file()
    assert json.loads((study / "laws.json").read_text())["laws"][0]["form"] == "power"
    for name in ("metric_gmacs", "metric_compute", "slices", "samples"):
        pixels = np.asarray(Image.open(study / f"charts/{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 5  # something is drawn
        if name != "samples":
            assert (study / f"charts/{name}.svg").read_text().startswith("<svg")


def test_page_is_one_file_that_needs_no_network(study: Path) -> None:
    page = (study / "report.html").read_text()
    assert 'name="viewport"' in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!data:)""", outside)
    assert "@import" not in outside
    assert "url(" not in outside
    assert page.count("data:image/png;base64,") >= 12  # the sample grids
    assert len(page) < 6e6


def test_page_begins_with_the_answer(study: Path) -> None:
    page = (study / "report.html").read_text()
    body = page.partition("</head>\n<body>")[2]
    top = body[: body.index("<h2>")]
    assert "DiT on MNIST" in top
    assert "What buys more" in top
    assert "fd_mnist falls with gmacs: each doubling lowers it by about" in top
    assert "90% interval" in top
    assert "through smaller patches" in top
    assert "Real data measured against real data gives 3.1" in top
    assert "scaling sweep experiments/mnist_dit --workdir W" in page


def test_charts_of_the_page_hold_every_configuration(study: Path) -> None:
    page = (study / "report.html").read_text()
    specs = specifications(page)
    assert list(specs) == ["metric_gmacs", "metric_compute", "slices"]
    for name in specs:
        assert page.count(f'<div class="chart" id="{name}"></div>') == 1
    for name, rows in (("metric_gmacs", 12), ("metric_compute", 48)):
        layer = specs[name]["layer"][-1]
        assert len(layer["data"]["values"]) == rows
        assert {"point", "gmacs", "y"} <= {tip["field"] for tip in layer["encoding"]["tooltip"]}


def test_slices_vary_one_thing(study: Path) -> None:
    plot = view(results.read(study))
    lines = slices(plot)
    assert {name: len(group) for name, group in lines.items()} == {"patch": 4, "depth": 3, "width": 6}
    assert [line["at"].tolist() for line in lines["depth"]] == [[2, 4]] * 3
    total, least, most = per_doubling(lines["patch"])
    assert -0.5 < most <= total <= least < 0


def test_sample_grids_go_by_gmacs_one_a_configuration(study: Path) -> None:
    captions = [caption for caption, _ in gallery(results.read(study))]
    assert len(captions) == 12
    assert captions[0].startswith("A/14")
    assert captions[-1].startswith("N/4")


def test_summary_table(study: Path) -> None:
    lines = summary_table(study).splitlines()
    assert lines[0].split() == [
        "depth",
        "width",
        "patch",
        "tokens",
        "params",
        "gmacs",
        "train_flops",
        "fd_mnist",
    ]
    assert lines[1].startswith("A/14")
    assert lines[12].startswith("N/4")
    assert "2 seeds" in lines[1]
    assert any(line.startswith("law in gmacs: exponent 0.") for line in lines)


def test_missing_and_failed_runs_are_told(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path)
    shutil.rmtree(root / "runs/variant=A-14_seed=0")
    failed = root / "runs/variant=F-7_seed=0"
    status = json.loads((failed / "status.json").read_text())
    status |= {"status": "failed", "reason": "loss is NaN at step 600 <&>"}
    (failed / "status.json").write_text(json.dumps(status))
    (failed / "metrics.jsonl").unlink()
    page = report(root).read_text()
    assert "2 of 12 runs are not done" in page
    assert "loss is NaN at step 600 &lt;&amp;&gt;" in page
    assert len(specifications(page)["metric_gmacs"]["layer"][-1]["data"]["values"]) == 10
    table = summary_table(root)
    assert "failed: variant=F-7_seed=0: loss is NaN" in table
    assert "missing: variant=A-14_seed=0" in table


def test_few_runs_and_none(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path / "few", sizes="A")
    assert "No law in gmacs: form=&#x27;power&#x27;: 3 different configurations" in report(root).read_text()
    shutil.rmtree(root / "runs")
    (root / "runs").mkdir()
    page = report(root).read_text()
    assert "No run is done yet" in page
    assert "missing" in summary_table(root)


def test_an_accuracy_is_answered_as_an_error(make_study: Callable[..., Path], tmp_path: Path) -> None:
    folder = results.read(make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5)))
    fitted, plot = laws.fit_laws(folder), view(folder)
    assert answers(folder, fitted, plot)[0].startswith("1 - val_top1 falls with gmacs")
    assert "N/4: val_top1 0.9" in " ".join(answers(folder, fitted, plot))


def test_families_have_a_marker_each_and_sizes_a_colour(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    """Swin without a depth, ResNet without a patch, and sizes of one name in several families."""
    root = make_study(tmp_path / "w", metric="val_top1", law=(0.1, 0.002, 0.5), sizes="AF")
    described = json.loads((root / "study.json").read_text())
    families = {"14": "vit", "7": "swin", "4": "resnet"}
    for name, overrides in described["runs"].items():
        family = families[overrides["model.variant"].split("/")[1]]
        file = root / "runs" / name / "config.json"
        written = json.loads(file.read_text())
        for fact in {"vit": [], "swin": ["depth"], "resnet": ["depth", "patch", "heads"]}[family]:
            del written["model"][fact]
        file.write_text(json.dumps(written))
        size = overrides["model.variant"][0]
        variant = f"{size}/14" if family == "vit" else size
        described["runs"][name] = {"model.name": family, "model.variant": variant, "train.seed": 0}
    (root / "study.json").write_text(json.dumps(described))
    page = report(root).read_text()
    folder = results.read(root)
    plot = view(folder)
    assert set(plot.last["point"]) == {"vit A/14", "vit F/14", "swin A", "swin F", "resnet A", "resnet F"}
    assert list(plot.markers) == ["vit", "swin", "resnet"] and list(plot.colours) == ["A", "F"]
    assert len(set(plot.markers.values())) == 3
    points = specifications(page)["metric_gmacs"]["layer"][-1]
    assert points["encoding"]["shape"]["scale"]["domain"] == ["vit", "swin", "resnet"]
    assert {(row["point"].split()[0], row["mark"]) for row in points["data"]["values"]} == {
        (family, family) for family in plot.markers
    }
    rows = summary_table(root).splitlines()[1:7]
    assert [row.split()[2:4] for row in rows if row.startswith("swin A")] == [["16", "7"]]


def test_a_metric_that_nobody_measured(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5))
    study = json.loads((root / "study.json").read_text())
    (root / "study.json").write_text(json.dumps({**study, "metric": "unheard_of", "lower_is_better": True}))
    assert "No run has been evaluated for unheard_of yet" in report(root).read_text()


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study\.json"):
        report(tmp_path)
