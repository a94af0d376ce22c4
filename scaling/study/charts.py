"""A study's charts. Each is built once, as an altair chart; its PNG, its SVG and the page all show that."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert
from PIL import Image

from scaling.files import make_folder, write_atomic
from scaling.study.laws import PERCENT, describe, law_in, named
from scaling.study.plot_data import VARIED, View, envelope, slices, view
from scaling.study.results import StudyFolder

GMACS = "forward multiply-adds per example (gmacs)"
FLOPS = "training compute (FLOPs)"
LAW = "#b3420a"  # colour of the law and its band, unlike that of any size
# Entries of the legend.
LAW_ENTRY, FRONTIER = f"law; {PERCENT} for it, for a new run", "frontier"
OPTIMAL = f"best for its compute, by the law; {PERCENT}"
INK, GREY = "#222222", "#777777"  # colours of text, and of legend symbols that stand for every size
WIDTH, HEIGHT = 520, 360  # pixels of the plotting area
SLICE_WIDTH, SLICE_HEIGHT = 180, 250
PIXELS = 2  # pixels of a still PNG per pixel of the chart

POINT_LEGEND: dict[str, Any] = {
    "title": None, "symbolSize": 90, "symbolOpacity": 1, "symbolStrokeWidth": 0, "symbolOffset": 4,
    "labelOffset": 8,
}  # fmt: skip

Entries = dict[str, tuple[str, list[float]]]  # legend text of a line -> (colour, dashes)
Chart = alt.LayerChart | alt.HConcatChart
Spec = dict[str, Any]  # in Vega-Lite
Law = Mapping[str, Any]  # in laws.json
VEGA_LITE = alt.SCHEMA_VERSION.rpartition(".")[0]  # major.minor, as the renderer names its versions


def build(folder: StudyFolder, laws: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns every chart that the study has data for: `metric_gmacs`, `metric_compute`, `slices`."""
    name, plot = folder.study["name"], view(folder)
    charts: dict[str, Chart] = {}
    if len(plot.last):
        charts["metric_gmacs"] = metric_gmacs(name, plot, law_in(laws, "gmacs"))
    if len(plot.curves):
        charts["metric_compute"] = metric_compute(name, plot, law_in(laws, "examples"))
    if panels := [slice_panel(plot, varied, lines) for varied, lines in slices(plot).items()]:
        charts["slices"] = side_by_side(panels)
    return charts


def metric_gmacs(name: str, plot: View, laws: Sequence[Law]) -> alt.LayerChart:
    """Draws the metric of each configuration at its last step against gmacs, with the laws and bands."""
    points, entries = plot.last, _entries(laws, "curve", LAW_ENTRY)
    several, noisy = points["seeds"] > 1, points["error"] > 0
    if several.any():
        entries["mean and range of seeds"] = (GREY, [1, 0])
    curves = [_renamed(law["curve"], "gmacs") for law in laws if "curve" in law]
    x, y = _log_x("gmacs", GMACS, points["gmacs"], curves), _metric_y(plot, points, curves)
    ranges = rows_chart(points[several]).mark_rule(strokeWidth=1.5)
    ranges = ranges.encode(x=x, y=_field(y, "low"), y2="high:Q", color=_size_colour(plot))
    marks = _points(plot, points, 100).encode(x=x, y=y, tooltip=_tooltip(plot, points))
    lines = [layer for curve in curves for layer in _band(curve, x, y, entries, LAW_ENTRY)]
    errors = [_errors(points[noisy], x, y)] if noisy.any() else []
    layers = [*(lines or _legend(x, y, entries)), *_floor(plot, points, y), *errors, ranges, marks]
    title = f"{name}: {plot.name} against gmacs at the last step"
    return _layered(layers, title, [*_described(laws), *_floor_note(plot, points)])


def metric_compute(name: str, plot: View, laws: Sequence[Law]) -> alt.LayerChart:
    """Draws each configuration's curve against training compute, their frontier, and the best by each law."""
    points = plot.curves
    entries = {**_entries(laws, "optimal", OPTIMAL), FRONTIER: ("#111111", [2.0, 2.0])}
    bests = [_best(law["optimal"]) for law in laws if "optimal" in law]
    x, y = _log_x("train_flops", FLOPS, points["train_flops"], bests), _metric_y(plot, points, bests)
    curves = rows_chart(points).mark_line(strokeWidth=1.4, opacity=0.8)
    curves = curves.encode(x=x, y=y, color=_size_colour(plot), detail="point:N", order="step:Q")
    edge = points.iloc[envelope(points["train_flops"].to_numpy(float), points["y"].to_numpy(float))]
    frontier = rows_chart(edge.assign(line=FRONTIER)).mark_line(strokeWidth=1.8)
    frontier = frontier.encode(x=x, y=y, **_line_channels(entries))
    marks = _points(plot, points, 35).encode(x=x, y=y, tooltip=_tooltip(plot, points))
    bands = [layer for best in bests for layer in _band(best, x, y, entries, OPTIMAL)]
    layers = [*bands, curves, frontier, *_floor(plot, points, y), marks]
    title = f"{name}: {plot.name} against training compute"
    return _layered(layers, title, [*_described(laws), *_floor_note(plot, points)])


def slice_panel(plot: View, varied: str, lines: Sequence[pd.DataFrame]) -> alt.LayerChart:
    """Draws lines along which only `varied` (patch, depth or width) varies. To the right is more compute."""
    points = pd.concat(lines)
    values = sorted(points["at"].unique())
    low, high = values[0] / 1.15, values[-1] * 1.15
    scale = alt.Scale(type="log", base=2, domain=[low, high], nice=False, reverse=varied == "patch")
    x = alt.X("at:Q", title=VARIED[varied], scale=scale, axis=alt.Axis(values=values, format="~r"))
    y = _metric_y(plot, plot.last, [])
    layers: list[alt.Chart] = []
    for line in lines:
        colour = plot.colours[line["size"].iloc[0]] if line["size"].nunique() == 1 else "#a0a0a0"
        layers.append(rows_chart(line).mark_line(color=colour, strokeWidth=1.5).encode(x=x, y=y))
    layers.append(_points(plot, points, 80).encode(x=x, y=y, tooltip=_tooltip(plot, points, ["fixed"])))
    return _layered(layers, f"{varied} alone", [], SLICE_WIDTH, SLICE_HEIGHT)


def side_by_side(panels: Sequence[alt.LayerChart]) -> alt.HConcatChart:
    """Returns panels in a row, with one legend and one y scale."""
    shared: Any = {"color": "shared", "shape": "shared", "y": "shared"}
    return alt.hconcat(*panels, spacing=20).resolve_scale(**shared)


# --- the pictures and the page -------------------------------------------------------------------


def draw(folder: StudyFolder, specs: Mapping[str, Spec]) -> dict[str, Path]:
    """Writes each chart into `charts/` as SVG and PNG; returns the PNG of each by name."""
    out = make_folder(folder.path / "charts")
    for name, chart in specs.items():
        vectors = svg(chart)
        write_atomic(out / f"{name}.svg", vectors)
        write_atomic(out / f"{name}.png", png(vectors))
    return {name: out / f"{name}.png" for name in specs}


def specification(chart: Chart) -> Spec:
    """Returns a chart's Vega-Lite specification, which is what its pictures and the page show."""
    return styled(chart).to_dict()


def svg(spec: Spec) -> str:
    """Renders a specification as an SVG file."""
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def png(svg: str) -> bytes:
    """Renders an SVG file as a PNG file."""
    drawn, packed = io.BytesIO(vl_convert.svg_to_png(svg, scale=PIXELS)), io.BytesIO()
    Image.open(drawn).convert("RGB").save(packed, format="png")  # a third of the bytes
    return packed.getvalue()


def page_spec(spec: Spec) -> Spec:
    """Returns the specification for the page, where a single chart becomes as wide as its place."""
    wide = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return spec | wide if "layer" in spec else spec


def styled(chart: Chart) -> alt.TopLevelMixin:
    """Returns the chart with the looks that all have: fonts, grid, no frame."""
    return chart.configure(
        background="white",
        font="DejaVu Sans, Verdana, sans-serif",
        axis=alt.AxisConfig(
            gridColor="#e4e4e4", domainColor="#555555", tickColor="#555555", labelColor="#444444",
            titleColor=INK, titleFontWeight="normal", labelFontSize=12, titleFontSize=12.5, titlePadding=8,
        ),
        legend=alt.LegendConfig(labelFontSize=12, labelColor=INK, rowPadding=5, labelLimit=260),
        title=alt.TitleConfig(fontSize=14, subtitleFontSize=12, subtitleColor="#444444", offset=12),
        view=alt.ViewConfig(stroke=None),
    )  # fmt: skip


# --- parts ---------------------------------------------------------------------------------------


def _layered(
    layers: Sequence[alt.Chart], title: str, subtitle: list[str], width: int = WIDTH, height: int = HEIGHT
) -> alt.LayerChart:
    more: dict[str, Any] = {"subtitle": subtitle} if subtitle else {}
    heading = alt.TitleParams(title, anchor="start", frame="group", **more)
    chart: Any = alt.layer(*layers, width=width, height=height, title=heading)
    return chart


def rows_chart(data: pd.DataFrame) -> alt.Chart:
    """Returns a chart of rows as JSON has them: without NaN."""
    return alt.Chart(alt.Data(values=json.loads(data.to_json(orient="records", double_precision=15))))


def _tick(value: float) -> str:
    """Returns a number as an axis prints it: 0.002, 5000, 1e12."""
    if 1e-4 <= value < 1e5:
        return f"{value:.6g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _log_axis(low: float, high: float, at_most: int) -> tuple[alt.Scale, alt.Axis]:
    """Returns a log scale, and an axis with plain numbers at as many round values as there is room for."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [v for d in decades for s in digits if low <= (v := float(f"{s}e{d}")) <= high]
        if len(values) <= at_most:
            break
    labels = " : ".join(f"datum.value == {v!r} ? '{_tick(v)}'" for v in values)
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return scale, alt.Axis(values=values, labelExpr=f"{labels} : ''" if labels else "''")


def _log_x(column: str, title: str, values: pd.Series, curves: Sequence[pd.DataFrame]) -> alt.X:
    """Returns the x axis of points, and of curves that go beyond them."""
    every = pd.concat([values, *(curve[column] for curve in curves)])
    scale, axis = _log_axis(float(every.min()) / 1.15, float(every.max()) * 1.15, 8)
    return alt.X(f"{column}:Q", title=title, scale=scale, axis=axis)


def _metric_y(plot: View, points: pd.DataFrame, curves: Sequence[pd.DataFrame]) -> alt.Y:
    """Returns the y axis that the points need, curves with their bands, and a floor not far below them.

    A band may have no end: the axis ends at half the lowest and twice the highest point, or value of a curve.
    """
    lowest, highest = float(points["low"].min()), float(points["high"].max())
    low, high = lowest, highest
    for curve in curves:
        least, most = min(lowest, float(curve["y"].min())), max(highest, float(curve["y"].max()))
        low = min(low, max(least / 2, float(curve["run_low"].min())))
        high = max(high, min(most * 2, float(curve["run_high"].max())))
    if curves and plot.floor is not None and plot.floor_fits(lowest):
        low = min(low, plot.floor)
    scale, axis = _log_axis(low / 1.1, high * 1.1, 8)
    return alt.Y("y:Q", title=f"{plot.name} (lower is better)", scale=scale, axis=axis)


def _field(channel: alt.Y, column: str) -> alt.Y:
    """Returns the same axis for another column."""
    other = channel.copy()
    other.shorthand = f"{column}:Q"
    return other


def _size_colour(plot: View) -> alt.Color:
    scale = alt.Scale(domain=list(plot.colours), range=list(plot.colours.values()))
    return alt.Color("size:N", scale=scale, legend=alt.Legend(**POINT_LEGEND, symbolType="circle"))


def _points(plot: View, data: pd.DataFrame, area: int) -> alt.Chart:
    """Draws points with the colour of their size and the marker of their patch or model."""
    scale = alt.Scale(domain=list(plot.markers), range=list(plot.markers.values()))
    legend = alt.Legend(**POINT_LEGEND, symbolFillColor=GREY) if any(plot.markers) else None
    marks = rows_chart(data).mark_point(filled=True, opacity=1, size=area, stroke="white", strokeWidth=0.8)
    return marks.encode(color=_size_colour(plot), shape=alt.Shape("mark:N", scale=scale, legend=legend))


def _tooltip(plot: View, data: pd.DataFrame, extra: Sequence[str] = ()) -> list[alt.Tooltip]:
    rows = [alt.Tooltip("point:N", title="configuration")]
    rows.append(alt.Tooltip("y:Q", title=plot.name, format=".4~g"))
    rows += [alt.Tooltip(f"{name}:N") for name in extra]
    for name, shape in (("gmacs", ".3~g"), ("train_flops", ".3~e"), ("params", ",d"), ("tokens", "d")):
        rows.append(alt.Tooltip(f"{name}:Q", format=shape))
    more = [name for name in ("depth", "width", "patch", "step", "seeds") if name in data]
    return rows + [alt.Tooltip(f"{name}:N") for name in more]


def _entries(laws: Sequence[Law], part: str, name: str) -> Entries:
    """Returns the laws' entry in the legend of lines; dashed where the values refute one of them."""
    drawn = [law for law in laws if part in law]
    dashes = [6.0, 4.0] if any(law["refutation"] for law in drawn) else [1.0, 0.0]
    return {name: (LAW, dashes)} if drawn else {}


def _described(laws: Sequence[Law]) -> list[str]:
    """Returns a line on each law; with its name, where there are several."""
    return [f"{named(law)}: {describe(law)}" if len(laws) > 1 else describe(law) for law in laws]


def _renamed(curve: Mapping[str, Any], column: str) -> pd.DataFrame:
    return pd.DataFrame(curve).rename(columns={"x": column, "value": "y"})


def _best(frontier: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the y of a compute-optimal frontier as a curve; the band of a run is not known."""
    curve = pd.DataFrame({"train_flops": frontier["train_flops"], **frontier["y"]}).rename(
        columns={"value": "y"}
    )
    return curve.assign(run_low=curve["low"], run_high=curve["high"])


def _line_channels(entries: Entries) -> dict[str, Any]:
    """Returns the channels by which a line's entry in the legend gives it its colour and its dashes."""
    colours, dashes = zip(*entries.values(), strict=True)
    legend = alt.Legend(title=None, symbolType="stroke", symbolSize=300, symbolStrokeWidth=2, rowPadding=0)
    return {
        "stroke": alt.Stroke(
            "line:N", scale=alt.Scale(domain=list(entries), range=list(colours)), legend=legend
        ),
        "strokeDash": alt.StrokeDash(
            "line:N", scale=alt.Scale(domain=list(entries), range=list(dashes)), legend=legend
        ),
    }


def _band(curve: pd.DataFrame, x: alt.X, y: alt.Y, entries: Entries, name: str) -> list[alt.Chart]:
    """Draws a law's curve, its interval and, paler, that of a new run."""
    base = rows_chart(curve.assign(line=name))
    titles = {"y": "law", "low": "lower end", "high": "upper end"}
    titles |= {"run_low": "a run's lower end", "run_high": "a run's upper end"}
    tip = [alt.Tooltip(f"{column}:Q", title=title, format=".4~g") for column, title in titles.items()]
    bands = [
        base.mark_area(color=LAW, opacity=opacity, clip=True).encode(x=x, y=_field(y, low), y2=f"{high}:Q")
        for low, high, opacity in (("run_low", "run_high", 0.09), ("low", "high", 0.15))
    ]
    line = base.mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, tooltip=tip, **_line_channels(entries))
    return [*bands, line]


def _errors(points: pd.DataFrame, x: alt.X, y: alt.Y) -> alt.Chart:
    """Draws the known standard errors of points, twice to either side: what measuring alone leaves open."""
    ends = points.assign(least=points["y"] - 2 * points["error"], most=points["y"] + 2 * points["error"])
    bars = rows_chart(ends[ends["least"] > 0]).mark_rule(strokeWidth=5, opacity=0.25, color=GREY, clip=True)
    return bars.encode(x=x, y=_field(y, "least"), y2="most:Q")


def _legend(x: alt.X, y: alt.Y, entries: Entries) -> list[alt.Chart]:
    """Draws the legend of lines alone, where no law brings it."""
    if not entries:
        return []
    nothing = pd.DataFrame({str(x.shorthand).partition(":")[0]: [], "y": [], "line": []})
    return [rows_chart(nothing).mark_line().encode(x=x, y=y, **_line_channels(entries))]


def _floor(plot: View, points: pd.DataFrame, y: alt.Y) -> list[alt.Chart]:
    """Draws real data against real data as a labelled line, unless it would squeeze the points together."""
    if not plot.floor_fits(float(points["low"].min())):
        return []
    base = alt.Chart(alt.Data(values=[{"y": plot.floor, "label": _floor_text(plot)}]))
    rule = base.mark_rule(color="#555555", strokeDash=[2, 3]).encode(y=y)
    label = base.mark_text(align="left", baseline="bottom", dy=-2, color="#555555", fontSize=12)
    return [rule, label.encode(x=alt.value(6), y=y, text="label:N")]


def _floor_note(plot: View, points: pd.DataFrame) -> list[str]:
    """Returns a line on real data against real data where the chart has no line for it."""
    below = plot.floor is not None and not plot.floor_fits(float(points["low"].min()))
    return [f"{_floor_text(plot)} (below this axis)"] if below else []


def _floor_text(plot: View) -> str:
    return f"real data against real data: {plot.floor:.3g}"
