"""A study's charts, as PNG and SVG: metric against gmacs, against training compute, slices, samples."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling.files import write_atomic
from scaling.study.laws import PERCENT, describe, envelope
from scaling.study.results import Run, StudyFolder
from scaling.study.view import VARIED, View, slices, view

GMACS = "forward multiply-adds per example (gmacs)"
FLOPS = "training compute (FLOPs)"
LAW = "#b3420a"  # the law and its band, apart from every size's colour
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#555", "axes.labelcolor": "#222", "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "xtick.color": "#444", "ytick.color": "#444", "legend.frameon": False, "legend.fontsize": 8.5,
    "svg.hashsalt": "scaling", "svg.fonttype": "path",
}  # fmt: skip


def draw(folder: StudyFolder, laws: Mapping[str, Any]) -> dict[str, Path]:
    """Writes every chart that the study has data for into `charts/`; returns the PNG of each by name."""
    out = folder.path / "charts"
    out.mkdir(exist_ok=True)
    made = {}
    for name, figure in figures(folder, laws).items():
        for ending in ("svg", "png"):
            buffer = io.BytesIO()
            metadata = {"Date": None} if ending == "svg" else {}  # the same data gives the same file
            with rc_context(cast(Any, STYLE)):
                figure.savefig(buffer, format=ending, dpi=150, metadata=metadata)
            figure.set_layout_engine("none")  # laid out once
            write_atomic(out / f"{name}.{ending}", buffer.getvalue())
        made[name] = out / f"{name}.png"
    return made


def figures(folder: StudyFolder, laws: Mapping[str, Any]) -> dict[str, Figure]:
    """Every chart that the study has data for, by name."""
    with rc_context(cast(Any, STYLE)):
        made = {
            "metric_gmacs": metric_gmacs(folder, laws),
            "metric_compute": metric_compute(folder, laws),
            "slices": slice_panels(folder),
            "samples": sample_grids(folder),
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def metric_gmacs(folder: StudyFolder, laws: Mapping[str, Any]) -> Figure | None:
    """The metric of every configuration at its last step against gmacs, with the law and its band."""
    shown = view(folder)
    if not len(shown.last):
        return None
    figure, ax = _canvas()
    _law(ax, laws["gmacs"], [*shown.last.low, *shown.last.high])
    for _, point in shown.last.iterrows():
        if point.seeds > 1:
            ax.vlines(point.gmacs, point.low, point.high, color=shown.colours[point["size"]], linewidth=1.2)
        _point(ax, point.gmacs, point, shown)
    _floor_line(ax, shown)
    _finish(
        ax, GMACS, f"{shown.name} (lower is better)", [*shown.last.low, *shown.last.high], shown.last.gmacs
    )
    _title(ax, folder, f"{shown.name} against gmacs at the last step", laws["gmacs"])
    seeds = "mean and range of seeds" if shown.last.seeds.max() > 1 else None
    _legends(ax, shown, laws["gmacs"], [seeds] if seeds else [])
    return figure


def metric_compute(folder: StudyFolder, laws: Mapping[str, Any]) -> Figure | None:
    """Every configuration's curve against training compute, their frontier, and its law."""
    shown = view(folder)
    if not len(shown.curves):
        return None
    figure, ax = _canvas()
    for _, curve in shown.curves.groupby("point", sort=False):
        size, mark = curve["size"].iloc[0], curve["mark"].iloc[0]
        ax.plot(
            curve.train_flops, curve.y, marker=shown.markers[mark][0], color=shown.colours[size],
            markersize=4, linewidth=1.1, alpha=0.85, markeredgewidth=0,
        )  # fmt: skip
    x, y = shown.curves.train_flops.to_numpy(float), shown.curves.y.to_numpy(float)
    frontier = envelope(x, y)
    ax.plot(x[frontier], y[frontier], color="#111", linewidth=1.4, linestyle=(0, (1, 1.2)), zorder=3)
    _law(ax, laws["train_flops"], shown.curves.y)
    _floor_line(ax, shown)
    _finish(ax, FLOPS, f"{shown.name} (lower is better)", shown.curves.y, shown.curves.train_flops)
    _title(ax, folder, f"{shown.name} against training compute", laws["train_flops"])
    _legends(ax, shown, laws["train_flops"], ["frontier"])
    return figure


def slice_panels(folder: StudyFolder) -> Figure | None:
    """A panel for each of patch, depth and width: lines along which nothing else of the three varies."""
    shown = view(folder)
    found = slices(shown)
    if not found:
        return None
    figure = Figure(figsize=(3.1 * len(found) + 1.8, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for ax, (varied, lines) in zip(panels, found.items(), strict=True):
        for line in lines:
            colour = shown.colours[line["size"].iloc[0]] if line["size"].nunique() == 1 else "#a0a0a0"
            ax.plot(line["at"], line.y, color=colour, linewidth=1.3, zorder=2)
            for _, point in line.iterrows():
                _point(ax, point["at"], point, shown)
        values = sorted({float(v) for line in lines for v in line["at"]})
        _finish(
            ax,
            VARIED[varied],
            f"{shown.name} (lower is better)" if ax is panels[0] else "",
            shown.last.y,
            values,
        )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(values, [f"{v:g}" for v in values])
        if varied == "patch":
            ax.invert_xaxis()  # to the right is more compute in every panel
        ax.set_title(f"{varied} alone")
    figure.legend(handles=_keys(shown), loc="outside right upper", labelspacing=0.6)
    return figure


def sample_grids(folder: StudyFolder) -> Figure | None:
    """The last sample grid of each configuration, from one noise, by gmacs."""
    chosen = [(caption, imread(image)) for caption, image in gallery(folder)]
    if not chosen:
        return None
    aspect = max(pixels.shape[0] / pixels.shape[1] for _, pixels in chosen)
    columns = min(4 if aspect > 0.3 else 2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.6 * columns, (2.6 * aspect + 0.5) * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax in panels:
        ax.axis("off")
    for ax, (caption, pixels) in zip(panels, chosen, strict=False):
        ax.imshow(pixels, cmap="gray", interpolation="nearest")
        ax.set_title(caption, fontsize=8.5)
    return figure


def gallery(folder: StudyFolder) -> list[tuple[str, Path]]:
    """(caption, file) of the last sample grid of each configuration's first run that has one, by gmacs."""
    table, metric = folder.table, folder.study["metric"]
    chosen: dict[str, tuple[float, str, Path]] = {}
    for run in folder.runs:
        image, rows = last_sample(run), table[table.run == run.name]
        if image is None or rows.empty or run.label in chosen:
            continue
        row = rows.iloc[-1]
        value = f", {metric} {row[metric]:.3g}" if metric in row and pd.notna(row[metric]) else ""
        chosen[run.label] = (row.gmacs, f"{run.label}\n{row.gmacs:.3g} gmacs{value}", image)
    return [(caption, image) for _, caption, image in sorted(chosen.values())]


def last_sample(run: Run) -> Path | None:
    images = sorted((run.folder / "samples").glob("step_*.png"))
    return images[-1] if images else None


# --- parts ---------------------------------------------------------------------------------------


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    return figure, figure.subplots()


def _point(ax: Axes, x: float, point: pd.Series, shown: View) -> None:
    marker, colour = shown.markers[point["mark"]][0], shown.colours[point["size"]]
    ax.plot(x, point.y, marker=marker, color=colour, markersize=8, markeredgecolor="white", zorder=3)


def _law(ax: Axes, law: Mapping[str, Any], ys: Iterable[float]) -> None:
    """The fitted curve and its band; dashed where the exponent is not identified.

    The band of such a law may have no end: it is cut at half and twice what `ys` span, for these to be read.
    """
    if "curve" not in law:
        return
    curve, shown = law["curve"], [*ys]
    low, high = (np.clip(curve[edge], min(shown) / 2, 2 * max(shown)) for edge in ("low", "high"))
    ax.fill_between(curve["x"], low, high, color=LAW, alpha=0.15, linewidth=0)
    ax.plot(curve["x"], curve["y"], color=LAW, linewidth=1.6, linestyle="-" if law["identified"] else "--")


def _floor_line(ax: Axes, shown: View) -> None:
    """Real data against real data: a line, or a note where a line would squeeze the points together."""
    if shown.floor is None:
        return
    text = f"real data against real data: {shown.floor:.3g}"
    if not shown.floor_fits(float(shown.curves.y.min())):
        ax.annotate(
            f"{text} (below this axis)", (0.01, 0.02), xycoords="axes fraction", color="#555", fontsize=8.5
        )
        return
    ax.axhline(shown.floor, color="#555", linewidth=1, linestyle=":")
    ax.annotate(
        text, (0.01, shown.floor), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", color="#555", fontsize=8.5,
    )  # fmt: skip


def _finish(ax: Axes, x: str, y: str, ys: Iterable[float], xs: Iterable[float]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    for axis, values in ((ax.yaxis, ys), (ax.xaxis, xs)):
        numbers = np.array([*values], float)
        _log_ticks(axis, numbers.max() / numbers.min())


def _log_ticks(axis: Axis, span: float) -> None:
    """Plain numbers on a log axis, more of them where it spans less."""
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if span < 8 else (1.0, 2.0, 5.0) if span < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """0.002, 5000, 1e12."""
    if 1e-4 <= value < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _title(ax: Axes, folder: StudyFolder, what: str, law: Mapping[str, Any]) -> None:
    ax.set_title(f"{folder.study['name']}: {what}\n", fontweight="bold")
    ax.text(0, 1.02, describe(law), transform=ax.transAxes, fontsize=8.5, color="#444", va="bottom")


def _keys(shown: View) -> list[Line2D]:
    """What colours and markers mean."""
    keys = [Line2D([], [], color=c, marker="o", linewidth=0, label=s) for s, c in shown.colours.items()]
    if any(shown.markers):
        keys += [
            Line2D([], [], color="#777", marker=marker, linewidth=0, label=mark)
            for mark, (marker, _) in shown.markers.items()
        ]
    return keys


def _legends(ax: Axes, shown: View, law: Mapping[str, Any], notes: Sequence[str]) -> None:
    """To the right of the axes, where they cover no point."""
    handles = _keys(shown)
    if "curve" in law:
        style: Any = "-" if law["identified"] else "--"
        handles.append(Line2D([], [], color=LAW, linestyle=style, label=f"law and {PERCENT} band"))
    for note in notes:
        if note == "frontier":
            handles.append(Line2D([], [], color="#111", linestyle=(0, (1, 1.2)), label=note))
        else:
            handles.append(Line2D([], [], color="#777", marker="|", markersize=10, linewidth=0, label=note))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.6)
