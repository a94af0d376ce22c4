"""`scaling report W`: results.csv, laws.json, charts, and one page that a colleague can open anywhere."""

import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from scaling.files import read_json, write_atomic, write_json
from scaling.metrics.kinds import FLOOR, STANDARD_ERROR
from scaling.overrides import override_flags
from scaling.study import results
from scaling.study.charts import build, draw, page_spec, specification
from scaling.study.laws import PERCENT, describe, fit_laws, named
from scaling.study.page import chart_place, data_uri, page, paragraphs, table
from scaling.study.plot_data import View, view
from scaling.study.results import FACTS, StudyFolder
from scaling.study.samples import draw_samples, gallery
from scaling.study.summary import answers, caveats, reason, text_table

GMACS_NOTE = (
    "Each mark is a configuration at its last step; a grey bar is two standard errors of measurement. gmacs: "
    "1e9 multiply-adds of one forward pass of one image (gflops are twice that). The line is the law, dashed "
    f"where the values refute it; the bands hold the law ({PERCENT}) and, paler, one new run, up to four "
    "times the largest. Point at a mark, or tap it, for its numbers."
)
COMPUTE_NOTE = (
    "Each line is a configuration as it trains, in FLOPs without recomputation. Dotted: the frontier, the "
    "best that any reached with so much compute. A law in size and examples adds what the best size would "
    "reach."
)
SLICES_NOTE = "Along each line, only one of patch, depth and width varies. To the right is more compute."
METHOD = (
    "A value counts if its learning rate had come to its end. Each law is a form with priors, fitted to log "
    "y by sequential Monte Carlo; spreads between configurations, between seeds and within runs are "
    f"estimated apart, and a configuration may be wild. Intervals hold {PERCENT}. Forms compete by their "
    "evidence: a law in gmacs is refuted where a broken or saturating one is likelier by far, or where a fit "
    "without the largest fifth of the configurations misses them."
)


def report(workdir: Path | str) -> Path:
    """Writes `results.csv`, `laws.json`, `charts/` and `report.html` from whatever runs there are.

    Returns:
        The path of the page: one file, readable without a network.

    Raises:
        UserError: if the folder is not a study's, or cannot be written.
    """
    folder = results.read(workdir)
    if (folder.path / "runs").is_dir():
        results.write(folder)
    laws, plot = fit_laws(folder), view(folder)
    write_json(folder.path / "laws.json", laws)
    specs = {name: specification(chart) for name, chart in build(folder, laws).items()}
    stills = draw(folder, specs)
    draw_samples(folder)
    parts = [*_top(folder, laws, plot), *_charts(stills, plot)]
    body = "\n".join([*parts, *_samples(folder), *_laws(laws), *_runs(folder), *_how(folder)])
    file = folder.path / "report.html"
    write_atomic(file, page(_title(folder), body, {name: page_spec(spec) for name, spec in specs.items()}))
    return file


def summary_table(workdir: Path | str) -> str:
    """Returns the configurations by gmacs, a line for each law, and the runs that are not done, as text."""
    folder = results.read(workdir)
    laws = read_json(folder.path / "laws.json") or fit_laws(folder)
    lines = [text_table(folder, view(folder)), ""]
    if laws["spearman"] is not None:
        both = f"{laws['pearson']:.3f} (Pearson), {laws['spearman']:.3f} (ranks)"
        lines.append(f"correlation of log gmacs and log {laws['fitted']}: {both}")
    lines += [f"law in {named(law)}: {describe(law)}" for law in laws["laws"]]
    lines += [f"{run.status}: {run.name}{reason(run)}" for run in folder.runs if run.status != "done"]
    return "\n".join(lines)


def _title(folder: StudyFolder) -> str:
    return folder.study.get("title") or folder.study["name"]


def _top(folder: StudyFolder, laws: Mapping[str, Any], plot: View) -> list[str]:
    texts = answers(folder, laws, plot) or ["No run is done yet, so there is no answer yet."]
    items = "".join(f"<li>{escape(text)}</li>" for text in caveats(folder, laws, plot))
    return [
        f"<h1>{escape(_title(folder))}</h1>",
        f'<p class="question">{escape(folder.study.get("question", ""))}</p>',
        f'<div class="answer">{paragraphs(texts)}</div>',
        f'<ul class="caveats">{items}</ul>' if items else "",
    ]


def _charts(stills: Mapping[str, Path], plot: View) -> list[str]:
    parts: list[str] = []
    for name, title, note in (
        ("metric_gmacs", f"{plot.name} against gmacs", GMACS_NOTE),
        ("metric_compute", f"{plot.name} against training compute", COMPUTE_NOTE),
        ("slices", "One thing at a time", SLICES_NOTE),
    ):
        if name in stills:
            parts += [f"<h2>{escape(title)}</h2>", chart_place(name, stills[name], title)]
            parts.append(f'<p class="note">{note}</p>')
    return parts


def _samples(folder: StudyFolder) -> list[str]:
    figures = [
        f'<figure><img src="{data_uri(image)}" alt="samples of {escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in _captioned(folder)
    ]
    if not figures:
        return []
    note = '<p class="note">All from one noise and the same labels, by gmacs.</p>'
    return ["<h2>Samples</h2>", note, f'<div class="grids">{"".join(figures)}</div>']


def _captioned(folder: StudyFolder) -> list[tuple[str, Path]]:
    return [(caption.replace("\n", ", "), image) for caption, image in gallery(folder)]


def _laws(laws: Mapping[str, Any]) -> list[str]:
    """Returns each law's residuals, predictions of the largest and forms, and what was left out."""
    parts = []
    for law in laws["laws"]:
        if "reason" in law:
            continue
        rows = [
            [
                p["point"],
                *(f"{p[key]:.4g}" for key in ("actual", "value", "low", "high")),
                f"{p['error']:+.1%}",
            ]
            for p in (law["held_out"] or {"predictions": []})["predictions"]
        ]
        columns = ["left out", "measured", "predicted", "low", "high", "error"]
        residuals = [
            [r["point"], f"{r['y']:.4g}", f"{r['law']:.4g}", f"{r['residual']:+.1%}"]
            for r in law["residuals"]
        ]
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in law["lack_of_fit"].items())
        spreads = ", ".join(f"{name} {spread:.1%}" for name, spread in law["spreads"].items())
        parts += [
            f"<details><summary>Law in {escape(named(law))}: residuals and lack of fit</summary>",
            f'<p class="note">{escape(f"Weights of forms: {weights}. Spreads: {spreads}.")}</p>',
            table(columns, rows, [False] * len(rows)) if rows else "",
            table(
                ["configuration", "y", "law", "residual"], residuals, [r[0] in law["wild"] for r in residuals]
            ),
            "</details>",
        ]
    if laws["left_out"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in laws["left_out"])
        title = f"What the laws left out ({len(laws['left_out'])} runs)"
        parts.append(f"<details><summary>{title}</summary><ul>{items}</ul></details>")
    return ["<h2>Laws</h2>", *parts] if parts else []


def _runs(folder: StudyFolder) -> list[str]:
    """Returns a table of every run, done or not; the caveats at the top say why not."""
    last = folder.table.groupby("run").last() if len(folder.table) else folder.table.set_index("run")
    first = [folder.metric.name] if folder.metric.name in folder.metrics else []
    others = [m for m in folder.metrics if not m.endswith((STANDARD_ERROR, FLOOR)) and m not in first]
    columns = [*first, *(f for f in FACTS if f in last), "tokens", "params", "gmacs", "train_flops", *others]
    order = {name: i for i, name in enumerate(last.sort_values(["gmacs", "run"]).index)}
    rows = []
    for run in sorted(folder.runs, key=lambda r: order.get(r.name, len(order))):
        values = [_cell(last.loc[run.name, c]) if run.name in last.index else "" for c in columns]
        steps = f"{run.step}/{run.steps}" if run.steps else ""
        rows.append([run.name, run.status, steps, *values])
    bad = [row[1] not in ("done", "running") for row in rows]
    return ["<h2>Runs</h2>", table(["run", "status", "steps", *columns], rows, bad)]


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _how(folder: StudyFolder) -> list[str]:
    study = folder.study
    flags = override_flags(study["overrides"])
    command = shlex.join(["scaling", "sweep", study["study"], "--workdir", "W", *flags])
    configs = [run.config for run in folder.runs if run.config]
    versions = sorted({f"{c.get('version')} ({c.get('commit') or 'no commit'})" for c in configs})
    source = (
        f"Base config {study['config']}; package version and commit: {', '.join(versions) or 'unknown'}. "
        "Each run's folder holds its whole config; the numbers are in results.csv and laws.json."
    )
    return [
        "<h2>How to repeat it</h2>",
        f"<pre>{escape(command)}\nscaling report W</pre>",
        *(f'<p class="note">{escape(text)}</p>' for text in (source, METHOD)),
    ]
