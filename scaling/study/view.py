"""What the charts show, made once for the still charts and for the page: points, curves, slices, looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from scaling.study.laws import objective
from scaling.study.results import FACTS, StudyFolder, point_label
from scaling.study.sweep import FAMILY, is_seed

MARKERS = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"))
VARIED = {"patch": "patch size (pixels)", "depth": "depth (blocks)", "width": "width (channels)"}


@dataclass(frozen=True)
class View:
    """A study ready to draw. `y` is the metric, or 1 - metric where higher is better.

    Attributes:
        name: of y.
        last: a row a configuration of done runs at their last step: `point`, `size`, `mark`, model facts,
            `gmacs`, `params`, `tokens`, `train_flops`, `y` (mean of `seeds`), `low`, `high`, by gmacs.
        curves: a row for each configuration and evaluated step, y averaged over seeds.
        colours: of each size, light to dark as they grow. markers: of each `mark`, (matplotlib's, Vega's);
            it says the patch, or the family where the study varies that.
        floor: the metric of real data against real data, where it is known.
    """

    name: str
    last: pd.DataFrame
    curves: pd.DataFrame
    colours: Mapping[str, str]
    markers: Mapping[str, tuple[str, str]]
    floor: float | None

    def floor_fits(self, lowest: float) -> bool:
        """Whether an axis down to the floor would not squeeze values from `lowest` on together."""
        return self.floor is not None and self.floor >= lowest / 3


def view(folder: StudyFolder) -> View:
    data, name = objective(folder)
    for fact in FACTS:
        if fact not in data:
            data = data.assign(**{fact: None})
    swept = [key for key in folder.swept if not is_seed(key)]
    labels = [point_label({key: row[key] for key in swept}) for _, row in data.iterrows()]
    data = data.assign(point=labels, patch=[_text(p) for p in data["patch"]])
    families = data.get(FAMILY)
    data = data.assign(size=[_size(row) for _, row in data.iterrows()])
    data = data.assign(mark=_patches(data) if families is None else families)
    done = data[data.run.isin(folder.done())]
    last = _points(done.loc[done.groupby("run")["step"].idxmax()] if len(done) else done, [])
    curves = _points(data[data.train_flops > 0], ["step"]).sort_values(["gmacs", "point", "step"])
    sizes = list(data.groupby("size")["gmacs"].mean().sort_values().index) if len(data) else []
    order = [-float(patch) if _is_number(patch) else 0.0 for patch in data["patch"]]  # none comes last
    marks = list(dict.fromkeys(data["mark"].iloc[np.argsort(order, kind="stable")]))
    return View(
        name=name,
        last=last.sort_values("gmacs").reset_index(drop=True),
        curves=curves.reset_index(drop=True),
        colours=dict(zip(sizes, ramp(len(sizes)), strict=True)),
        markers={mark: MARKERS[i % len(MARKERS)] for i, mark in enumerate(marks)},
        floor=_floor(folder),
    )


def _patches(data: pd.DataFrame) -> list[str]:
    """What the marker of each row means, empty where no row has a patch."""
    known = any(data["patch"])
    return [f"patch {patch}" if patch else "no patch" if known else "" for patch in data["patch"]]


def ramp(count: int) -> list[str]:
    """Colours from light to dark (viridis without its yellow), apart for every kind of colour vision."""
    return [to_hex(matplotlib.colormaps["viridis"](t)) for t in np.linspace(0.82, 0.0, max(count, 2))][:count]


def _points(data: pd.DataFrame, extra: list[str]) -> pd.DataFrame:
    keys = ["point", "size", "mark", *FACTS, "params", "gmacs", "tokens", "train_flops", *extra]
    grouped = data.groupby(keys, dropna=False, sort=False)["y"]
    return grouped.agg(y="mean", low="min", high="max", seeds="count").reset_index()


def _size(row: pd.Series) -> str:
    """What the colour says: the variant's size, else depth x width, else the configuration."""
    variant = next((str(v) for k, v in row.items() if str(k).endswith(".variant") and pd.notna(v)), "")
    if FAMILY not in row and pd.notna(row["depth"]) and pd.notna(row["width"]):
        shape = f"depth {_text(row['depth'])}, width {_text(row['width'])}"
        return f"{variant.partition('/')[0]}: {shape}" if "/" in variant else shape
    return variant.partition("/")[0] or str(row["point"])


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _floor(folder: StudyFolder) -> float | None:
    column = folder.table.get(f"{folder.study['metric']}_floor")
    return float(column.median()) if column is not None and column.notna().any() else None


# --- slices --------------------------------------------------------------------------------------


def slices(shown: View) -> dict[str, list[pd.DataFrame]]:
    """Lines of points that differ in one of patch, depth and width only (heads may follow the width).

    Returns:
        For each of the three that has any: the lines, ordered by `at` (the value that varies), with `fixed`
        in words.
    """
    data = shown.last.dropna(subset=["depth", "width"])
    data = data[data["patch"].map(_is_number).astype(bool)]
    found: dict[str, list[pd.DataFrame]] = {}
    for varied in VARIED:
        others = [v for v in VARIED if v != varied]
        for values, line in data.assign(at=data[varied].astype(float)).groupby(others):
            if line["at"].nunique() < 2 or line["at"].duplicated().any():
                continue  # nothing varies, or something else than the three does
            fixed = ", ".join(f"{k} {_text(v)}" for k, v in zip(others, values, strict=True))
            found.setdefault(varied, []).append(line.sort_values("at").assign(fixed=fixed))
    return found


def per_doubling(lines: list[pd.DataFrame]) -> tuple[float, float, float]:
    """Change of y when gmacs double along lines, -0.2 for a fall by a fifth: (over all, least, most)."""
    slopes = []
    for line in lines:
        x, y = np.log2(line["gmacs"].to_numpy(float)), np.log2(line["y"].to_numpy(float))
        slopes.append((y[np.argmax(x)] - y[np.argmin(x)], np.ptp(x)))
    rises, runs = np.array(slopes).T
    each = 2 ** (rises / runs) - 1
    return float(2 ** (rises.sum() / runs.sum()) - 1), float(each.max()), float(each.min())
