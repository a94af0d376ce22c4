"""The data of the charts: points, curves, slices, and the colour and marker of each point."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.study.evidence import configurations, measured_floor, with_y
from scaling.study.results import FACTS, StudyFolder
from scaling.study.sweep import MODEL_NAME

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")  # Vega's names
# The colour map viridis at 12 even positions from 0.82 to 0: light to dark, without its yellow.
VIRIDIS = (
    "#86d549", "#5ac864", "#37b878", "#22a785", "#1f958b", "#25838e",
    "#2c718e", "#355f8d", "#3e4a89", "#463480", "#481c6e", "#440154",
)  # fmt: skip
AGGREGATES = {"y": "mean", "low": "min", "high": "max", "seeds": "count"}  # of the y of a configuration
VARIED = {"patch": "patch size (pixels)", "depth": "depth (blocks)", "width": "width (channels)"}


@dataclass(frozen=True)
class View:
    """A study ready to draw. `y` is lower where the metric is better (`Metric.y`).

    Attributes:
        name: name of y.
        last: one row for each configuration of done runs at their last step, sorted by gmacs: `point`,
            `size`, `mark`, model facts, `gmacs`, `params`, `tokens`, `train_flops`, `y` (mean of `seeds`),
            `low`, `high`, `error` (the known standard error of y, 0 where there is none).
        curves: one row for each configuration and evaluated step, y averaged over seeds.
        colours: the colour of each size, light to dark as sizes grow.
        markers: the shape of each `mark`: of each patch, or of each model where the study varies that.
        floor: the metric of real data against real data, where it is known.
    """

    name: str
    last: pd.DataFrame
    curves: pd.DataFrame
    colours: Mapping[str, str]
    markers: Mapping[str, str]
    floor: float | None

    def floor_fits(self, lowest: float) -> bool:
        """Returns whether an axis can reach down to the floor without squeezing values above `lowest`."""
        return self.floor is not None and self.floor >= lowest / 3


def view(folder: StudyFolder) -> View:
    """Returns what the charts of a study show."""
    data = with_y(folder)
    for fact in FACTS:
        if fact not in data:
            data = data.assign(**{fact: None})
    data = data.assign(point=data["run"].map(configurations(folder)), patch=[_text(p) for p in data["patch"]])
    models = data.get(MODEL_NAME)
    data = data.assign(size=[_size(row) for _, row in data.iterrows()])
    data = data.assign(mark=_patch_marks(data) if models is None else models)
    done = data[data.run.isin(folder.done())]
    last = _points(done.loc[done.groupby("run")["step"].idxmax()] if len(done) else done, [])
    curves = _points(data[data.train_flops > 0], ["step"]).sort_values(["gmacs", "point", "step"])
    sizes = list(data.groupby("size")["gmacs"].mean().sort_values().index) if len(data) else []
    order = [-float(patch) if _is_number(patch) else 0.0 for patch in data["patch"]]  # no patch comes last
    marks = list(dict.fromkeys(data["mark"].iloc[np.argsort(order, kind="stable")]))
    return View(
        name=folder.metric.label,
        last=last.sort_values("gmacs").reset_index(drop=True),
        curves=curves.reset_index(drop=True),
        colours=dict(zip(sizes, ramp(len(sizes)), strict=True)),
        markers={mark: SHAPES[i % len(SHAPES)] for i, mark in enumerate(marks)},
        floor=measured_floor(folder),
    )


def ramp(count: int) -> list[str]:
    """Returns colours from light to dark, which every kind of colour vision can tell apart."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in VIRIDIS])
    places = np.linspace(0, len(VIRIDIS) - 1, max(count, 2))[:count]
    channels = [np.interp(places, np.arange(len(VIRIDIS)), channel) for channel in anchors.T]
    colours = zip(*channels, strict=True)
    return ["#" + "".join(f"{round(value):02x}" for value in colour) for colour in colours]


def _patch_marks(data: pd.DataFrame) -> list[str]:
    """Returns the legend text of each row's marker, empty where no row has a patch."""
    known = any(data["patch"])
    return [f"patch {patch}" if patch else "no patch" if known else "" for patch in data["patch"]]


def _points(data: pd.DataFrame, extra: list[str]) -> pd.DataFrame:
    keys = ["point", "size", "mark", *FACTS, "params", "gmacs", "tokens", "train_flops", *extra]
    grouped = data.groupby(keys, dropna=False, sort=False)
    columns: dict[str, Any] = {name: ("y", how) for name, how in AGGREGATES.items()}
    points = grouped.agg(**columns, error=("error", "mean")).reset_index()
    return points.assign(error=points["error"] / np.sqrt(points["seeds"]))


def _size(row: pd.Series) -> str:
    """Returns what the colour stands for: the variant's size, else depth x width, else the configuration."""
    variant = next((str(v) for k, v in row.items() if str(k).endswith(".variant") and pd.notna(v)), "")
    if MODEL_NAME not in row and pd.notna(row["depth"]) and pd.notna(row["width"]):
        shape = f"depth {_text(row['depth'])}, width {_text(row['width'])}"
        return f"{variant.partition('/')[0]}: {shape}" if "/" in variant else shape
    return variant.partition("/")[0] or str(row["point"])


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def envelope(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the indices [M] of the lower envelope, by x: no value at a smaller or equal x is as low."""
    order = np.lexsort((y, x))
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(y[order])[:-1]])
    return order[y[order] < lowest]


# --- slices --------------------------------------------------------------------------------------


def slices(plot: View) -> dict[str, list[pd.DataFrame]]:
    """Returns lines of points that differ in one of patch, depth and width only.

    Heads may follow the width.

    Returns:
        For each of the three that has any: the lines, ordered by `at` (the value that varies), with `fixed`
        in words.
    """
    data = plot.last.dropna(subset=["depth", "width"])
    data = data[data["patch"].map(_is_number).astype(bool)]
    lines: dict[str, list[pd.DataFrame]] = {}
    for varied in VARIED:
        others = [v for v in VARIED if v != varied]
        for values, line in data.assign(at=data[varied].astype(float)).groupby(others):
            if line["at"].nunique() < 2 or line["at"].duplicated().any():
                continue  # nothing varies, or something other than the three does
            fixed = ", ".join(f"{k} {_text(v)}" for k, v in zip(others, values, strict=True))
            lines.setdefault(varied, []).append(line.sort_values("at").assign(fixed=fixed))
    return lines


def per_doubling(lines: list[pd.DataFrame]) -> tuple[float, float, float]:
    """Returns the relative change of y when gmacs double along lines, such as -0.2 for a fall by a fifth.

    Returns:
        (over all lines, of the line that falls least, of the line that falls most).
    """
    slopes = []
    for line in lines:
        x, y = np.log2(line["gmacs"].to_numpy(float)), np.log2(line["y"].to_numpy(float))
        slopes.append((y[np.argmax(x)] - y[np.argmin(x)], np.ptp(x)))
    rises, runs = np.array(slopes).T
    each = 2 ** (rises / runs) - 1
    return float(2 ** (rises.sum() / runs.sum()) - 1), float(each.max()), float(each.min())
