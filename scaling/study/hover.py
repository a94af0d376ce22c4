"""The report's hover charts as Vega-Lite specifications, in the colours and markers of the still ones."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from scaling.study.charts import FLOPS, GMACS, LAW, tick
from scaling.study.laws import envelope
from scaling.study.view import VARIED, View, slices

HEIGHT, SLICE_HEIGHT = 360, 270  # pixels


def hover_charts(shown: View, laws: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Specifications of the charts that a study has data for, by name."""
    made: dict[str, dict[str, Any]] = {}
    if len(shown.last):
        made["metric_gmacs"] = _finished(_gmacs(shown, laws["gmacs"]), HEIGHT)
    if len(shown.curves):
        made["metric_compute"] = _finished(_compute(shown, laws["train_flops"]), HEIGHT)
    for varied, lines in slices(shown).items():
        made[f"slice_{varied}"] = _finished(_slice(shown, varied, lines), SLICE_HEIGHT)
    return made


def _finished(layers: Sequence[alt.Chart], height: int) -> dict[str, Any]:
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = alt.layer(*layers).properties(width="container", height=height, autosize=fit)
    chart = chart.configure_axis(
        gridColor="#e8e8e8", labelFontSize=12, titleFontSize=12, titleFontWeight="normal"
    )
    return chart.configure_view(stroke=None).to_dict()


def _gmacs(shown: View, law: Mapping[str, Any]) -> list[alt.Chart]:
    data = shown.last
    x, y = _x("gmacs", GMACS, data), _y(shown, data)
    points = _marks(data, shown, 90).encode(x=x, y=y, tooltip=_tooltip(data, shown))
    ranges = _chart(data).mark_rule(strokeWidth=1.4)
    ranges = ranges.encode(x=x, y=_y(shown, data, "low"), y2="high:Q", color=_colour(shown))
    return [*_law(law, "gmacs", x, shown, data), *_floor(shown, data), ranges, points]


def _compute(shown: View, law: Mapping[str, Any]) -> list[alt.Chart]:
    data = shown.curves
    x, y = _x("train_flops", FLOPS, data), _y(shown, data)
    lines = _chart(data).mark_line(strokeWidth=1.2, opacity=0.7)
    lines = lines.encode(x=x, y=y, color=_colour(shown), detail="point:N", order="step:Q")
    edge = data.iloc[envelope(data["train_flops"].to_numpy(float), data["y"].to_numpy(float))]
    frontier = _chart(edge).mark_line(color="#111", strokeDash=[2, 2], strokeWidth=1.6).encode(x=x, y=y)
    points = _marks(data, shown, 30).encode(x=x, y=y, tooltip=_tooltip(data, shown))
    return [*_law(law, "train_flops", x, shown, data), lines, frontier, *_floor(shown, data), points]


def _slice(shown: View, varied: str, lines: Sequence[pd.DataFrame]) -> list[alt.Chart]:
    data = pd.concat(lines)
    values = sorted(data["at"].unique(), reverse=varied == "patch")  # to the right is more compute
    x = alt.X("at:O", title=VARIED[varied], sort=values, axis=alt.Axis(labelAngle=0, format="~r"))
    y = _y(shown, shown.last)
    joined = _chart(data).mark_line(color="#999", strokeWidth=1.3).encode(x=x, y=y, detail="fixed:N")
    return [joined, _marks(data, shown, 80).encode(x=x, y=y, tooltip=_tooltip(data, shown, ["fixed"]))]


# --- parts ---------------------------------------------------------------------------------------


def _chart(data: pd.DataFrame) -> alt.Chart:
    """A chart of rows as JSON has them: no NaN."""
    return alt.Chart(alt.Data(values=json.loads(data.to_json(orient="records", double_precision=15))))


def _log_axis(lowest: float, highest: float, at_most: int) -> tuple[alt.Scale, alt.Axis]:
    """A log scale with a margin, and plain numbers at as many round values as there is room for."""
    low, high = lowest / 1.25, highest * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [v for d in decades for s in digits if low <= (v := float(f"{s}e{d}")) <= high]
        if len(values) <= at_most:
            break
    labels = " : ".join(f"datum.value == {v!r} ? '{tick(v)}'" for v in values)
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return scale, alt.Axis(values=values, labelExpr=f"{labels} : ''" if labels else "''")


def _x(name: str, title: str, data: pd.DataFrame) -> alt.X:
    scale, axis = _log_axis(float(data[name].min()), float(data[name].max()), 5)
    return alt.X(f"{name}:Q", title=title, scale=scale, axis=axis)


def _y(shown: View, data: pd.DataFrame, column: str = "y") -> alt.Y:
    """`column` on the scale that all of `data`, and a floor that is not far below it, need."""
    low, high = float(data["low"].min()), float(data["high"].max())
    if shown.floor_fits(low):
        low = min(low, shown.floor or low)
    scale, axis = _log_axis(low, high, 8)
    return alt.Y(f"{column}:Q", title=f"{shown.name} (lower is better)", scale=scale, axis=axis)


def _colour(shown: View) -> alt.Color:
    scale = alt.Scale(domain=list(shown.colours), range=list(shown.colours.values()))
    return alt.Color("size:N", scale=scale, legend=None)


def _marks(data: pd.DataFrame, shown: View, size: int) -> alt.Chart:
    """Points with the colour of their size and a marker of their patch or family; the page has the key."""
    scale = alt.Scale(domain=list(shown.markers), range=[vega for _, vega in shown.markers.values()])
    marks = _chart(data).mark_point(filled=True, opacity=1, size=size, strokeWidth=0.7)
    return marks.encode(color=_colour(shown), shape=alt.Shape("mark:N", scale=scale, legend=None))


def _tooltip(data: pd.DataFrame, shown: View, extra: Sequence[str] = ()) -> list[alt.Tooltip]:
    rows = [alt.Tooltip("point:N", title="configuration")]
    rows.append(alt.Tooltip("y:Q", title=shown.name, format=".4~g"))
    rows += [alt.Tooltip(f"{name}:N") for name in extra]
    for name, shape in (("gmacs", ".3~g"), ("train_flops", ".3~e"), ("params", ",d"), ("tokens", "d")):
        rows.append(alt.Tooltip(f"{name}:Q", format=shape))
    more = [name for name in ("depth", "width", "patch", "step", "seeds") if name in data]
    return rows + [alt.Tooltip(f"{name}:N") for name in more]


def _law(law: Mapping[str, Any], column: str, x: alt.X, shown: View, data: pd.DataFrame) -> list[alt.Chart]:
    if "curve" not in law:
        return []
    base = _chart(pd.DataFrame(law["curve"]).rename(columns={"x": column}))
    band = base.mark_area(color=LAW, opacity=0.15, clip=True)
    line = base.mark_line(color=LAW, strokeWidth=2, strokeDash=[1, 0] if law["identified"] else [6, 4])
    titles = {"y": "law", "low": "lower end", "high": "upper end"}
    tip = [alt.Tooltip(f"{name}:Q", title=title, format=".4~g") for name, title in titles.items()]
    band = band.encode(x=x, y=_y(shown, data, "low"), y2="high:Q")
    return [band, line.encode(x=x, y=_y(shown, data), tooltip=tip)]


def _floor(shown: View, data: pd.DataFrame) -> list[alt.Chart]:
    if not shown.floor_fits(float(data["low"].min())):
        return []
    rule = alt.Chart(alt.Data(values=[{"y": shown.floor}])).mark_rule(color="#555", strokeDash=[2, 3])
    tip = [alt.Tooltip("y:Q", title="real data against real data", format=".3~g")]
    return [rule.encode(y=_y(shown, data), tooltip=tip)]
