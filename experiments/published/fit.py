"""Fits laws to published values, and prints the tables of README.md: python experiments/published/fit.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.laws.belief import Belief, believe, correlations, summary
from scaling.laws.optimal import optimal
from scaling.laws.values import of_table

HERE = Path(__file__).parent
Rows = Sequence[Sequence[str]]


def table(columns: Sequence[str], rows: Rows) -> str:
    """Returns rows as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def interval(draws: NDArray[np.float64], digits: int = 3) -> str:
    """Returns the median of draws and the ends of their 90 % interval."""
    found = summary(draws)
    value, low, high = (f"{found[key]:.{digits}g}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def fitted(rows: pd.DataFrame, x: Sequence[str], y: str, form: str) -> Belief:
    """Fits a form to columns of a table."""
    return believe(of_table(rows, x, y), form)


def run_at(belief: Belief, row: Mapping[str, float]) -> str:
    """Returns the prediction of a new run at the quantities of a row."""
    return interval(belief.runs(np.array([[row[name] for name in belief.values.names]], float))[:, 0])


def chinchilla() -> str:
    """Returns Hoffmann et al.'s surface, without the five highest losses, as Besiroglu et al. fit it."""
    rows = pd.read_csv(HERE / "chinchilla.csv").sort_values("loss").iloc[:-5]
    belief = fitted(rows, ("params", "tokens"), "loss", "joint")
    best = optimal(belief, np.array([5.76e23]), 6.0)
    found = [interval(belief.parameters[name], 4) for name in ("E", "A", "B", "alpha", "beta")]
    found += [interval(best.exponents["size"]), interval(best.y[:, 0], 4)]
    columns = ["Chinchilla", "E", "A", "B", "alpha", "beta", "exponent of N", "loss at 5.76e23 FLOPs"]
    theirs = ["1.817 (0.026)", "482 (125)", "2085 (1293)", "0.348 (0.015)", "0.366 (0.021)", "0.51", "1.974"]
    return table(columns, [["here", *found], ["Besiroglu et al.", *theirs]])


def dit() -> str:
    """Returns DiT's L/2 and XL/2 as predicted from the ten others, and the correlation of Figure 8."""
    rows = pd.read_csv(HERE / "dit_table4.csv")
    left = rows["model"].isin(["DiT-L/2", "DiT-XL/2"])
    rest, held = rows[~left], rows[left]
    surface = fitted(rest, ("tokens", "gmacs_per_token"), "fid50k", "surface")
    power = fitted(rest, ("gmacs",), "fid50k", "power")
    predictions = [
        [row["model"], f"{row['fid50k']:.2f}", run_at(surface, row), run_at(power, row)]
        for row in held.to_dict("records")
    ]
    found = correlations(rows[["gmacs"]].to_numpy(float), rows["fid50k"].to_numpy(float))
    line = f"Correlation of log gmacs and log FID: {found['pearson']:.2f}; of log gmacs and FID: "
    line += f"{np.corrcoef(np.log(rows['gmacs']), rows['fid50k'])[0, 1]:.2f} (the paper prints -0.93).\n"
    columns = ["DiT, FID-50K", "was", "surface in tokens and gmacs per token", "power law in gmacs"]
    return table(columns, predictions) + "\n" + line


def frontier(rows: pd.DataFrame, y: str) -> tuple[float, float]:
    """Returns A and alpha of A C^-alpha through the points that none of less compute undercuts."""
    rows = rows.sort_values("gmacs_total")
    kept = rows[rows[y] <= rows[y].cummin()]
    slope, level = np.polyfit(np.log(kept["gmacs_total"]), np.log(kept[y]), 1)
    return float(np.exp(level)), float(-slope)


def clip() -> str:
    """Returns Cherti et al.'s laws in compute, and laws in gmacs and samples of each data set."""
    rows = pd.read_csv(HERE / "clip_cherti.csv")
    rows["imagenet"], rows["coco"] = 1 - rows["imagenet_top1"], 1 - rows["coco_image_retrieval_r5"]
    laion = rows[rows["data"] != "CLIP-WIT"]
    lines = []
    for title, part, y, theirs in (
        ("ImageNet error, LAION", laion, "imagenet", "5.86 C^-0.111"),
        ("ImageNet error, OpenAI's", rows[rows["data"] == "CLIP-WIT"], "imagenet", "23.2 C^-0.164"),
        ("COCO image retrieval, 1 - R@5, LAION", laion, "coco", "C^-0.079"),
    ):
        factor, alpha = frontier(part, y)
        lines.append([title, f"{factor:.3g} C^-{alpha:.3f}", theirs])
    of_set = []
    for name, part in laion.groupby("data", sort=False):
        largest = part.sort_values("gmacs_total").iloc[-1]
        belief = fitted(part, ("gmacs", "samples_seen"), "imagenet", "joint")
        rest = fitted(part.drop(index=largest.name), ("gmacs", "samples_seen"), "imagenet", "joint")
        found = [interval(belief.parameters[key], 2) for key in ("E", "alpha", "beta")]
        of_set.append(
            [str(name), str(len(part)), *found, f"{largest['imagenet']:.3f}", run_at(rest, largest)]
        )
    columns = ["ImageNet error", "models", "E", "alpha (gmacs)", "beta (samples)", "largest was", "predicted"]
    return table(["CLIP", "frontier here", "Cherti et al."], lines) + "\n" + table(columns, of_set)


def ddt() -> str:
    """Returns laws of FID in training steps, of each curve of Wang et al.'s DDT."""
    found = []
    for (model, split), rows in pd.read_csv(HERE / "ddt_fid.csv").groupby(["model", "split"], sort=False):
        belief = fitted(rows, ("steps",), "fid", "power")
        name = f"{model}, {str(split).replace('encoder', ' + ').replace('decoder', '')}"
        alpha, floor = interval(belief.parameters["alpha"], 2), interval(belief.parameters["E"], 2)
        last = rows.iloc[-1]
        found.append([name, f"{last['fid']:.2f}", alpha, floor, run_at(belief, {"steps": 2 * last["steps"]})])
    columns = ["DDT, encoder + decoder blocks", "FID at 400k", "exponent of steps", "E", "at 800k steps"]
    return table(columns, found)


if __name__ == "__main__":
    for part in (chinchilla, dit, clip, ddt):
        print(part())
