"""A study in words: the answer with its interval, what to be careful about, and a plain table."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from scaling.study.laws import PERCENT
from scaling.study.plot_data import View, per_doubling, slices
from scaling.study.results import RunRecord, StudyFolder

COLUMNS = ["depth", "width", "patch", "tokens"]  # facts in the plain table
WEAK = 0.9  # absolute rank correlation below which the report does not say "falls with gmacs"


def answers(folder: StudyFolder, laws: Mapping[str, Any], plot: View) -> list[str]:
    """Returns what the study found, most important first; empty if no configuration is done yet."""
    if not len(plot.last):
        return []
    texts = [_trend(laws, plot), _law(laws["gmacs"], plot.name, "gmacs", "gmacs"), _choices(plot)]
    best = plot.last.sort_values("y").iloc[0]
    value = best["y"] if folder.study["lower_is_better"] else 1 - best["y"]
    texts.append(
        f"The best configuration is {best['point']}: {folder.study['metric']} {value:.4g} "
        f"with {best['gmacs']:.3g} gmacs."
    )
    texts.append(_law(laws["train_flops"], plot.name, "training compute (along the frontier)", "FLOPs"))
    return [text for text in texts if text]


def caveats(folder: StudyFolder, laws: Mapping[str, Any], plot: View) -> list[str]:
    """Returns what a reader has to know before using the answer."""
    texts = []
    unfinished = [f"{run.name} {run.status}{reason(run)}" for run in folder.runs if run.status != "done"]
    if unfinished:
        count = f"{len(unfinished)} of {len(folder.runs)} runs"
        texts.append(f"{count} are not done, and missing at the last step: {'; '.join(unfinished)}.")
    if folder.study["metric"] not in folder.table:
        texts.append(f"No run has been evaluated for {folder.study['metric']} yet.")
        return texts
    if len(plot.last) and plot.last["seeds"].max() == 1:
        texts.append("One seed per configuration: differences between neighbours may be chance.")
    for x, law in (("gmacs", laws["gmacs"]), ("training compute", laws["train_flops"])):
        predictions = law.get("held_out", {}).get("predictions", [])
        missed = [p for p in predictions if not p["interval"][0] <= p["actual"] <= p["interval"][1]]
        if missed:
            texts.append(
                f"Against {x} the law does not extrapolate well: {len(missed)} of {len(predictions)} "
                f"held-out values lie outside their {PERCENT} interval."
            )
    if plot.floor is not None:
        floor = f"Real data measured against real data gives {plot.floor:.3g}"
        texts.append(f"{floor}: a model cannot be expected to get below it.")
    return texts


def reason(run: RunRecord) -> str:
    """Returns why a run is not done, or how far it is."""
    return f": {run.reason}" if run.reason else f" at step {run.step} of {run.steps}" if run.steps else ""


def _trend(laws: Mapping[str, Any], plot: View) -> str:
    rho, law = laws["spearman"], laws["gmacs"]
    if rho is None:
        return f"{len(plot.last)} configurations are done: too few to tell a trend."
    points = f"rank correlation {rho:.2f} over {len(plot.last)} configurations"
    if rho > -WEAK:
        return f"{plot.name} does not fall clearly with gmacs ({points})."
    if "slope" not in law:
        return f"{plot.name} falls with gmacs ({points})."
    low, high = (1 - 2**-s for s in law["slope_interval"])
    return (
        f"{plot.name} falls with gmacs: each doubling lowers it by about {1 - 2 ** -law['slope']:.0%} "
        f"({PERCENT} interval {low:.0%} to {high:.0%}) within the range tested ({points})."
    )


def _law(law: Mapping[str, Any], name: str, x: str, unit: str) -> str:
    if not law["identified"]:
        return f"The exponent of a law in {x} is not identified: {law['reason']}."
    (low, high), (least, most) = law["alpha_interval"], law["E_interval"]
    text = (
        f"Law in {x}: {name} = {law['E']:.3g} + {law['A']:.3g} · {unit}^−{law['alpha']:.2f}; "
        f"exponent {low:.2f} to {high:.2f}, irreducible term {least:.3g} to {most:.3g} ({PERCENT} intervals)."
    )
    held_out = law["held_out"]
    if "predictions" not in held_out:
        return f"{text} No prediction was tested: {held_out['reason']}."
    errors = ", ".join(f"{p['error']:+.0%}" for p in held_out["predictions"])
    without = " and ".join(held_out["left_out"])
    return f"{text} Fitted without {without}, it predicts their values with an error of {errors}."


def _choices(plot: View) -> str:
    """Returns what the same compute buys when it goes into smaller patches, depth or width."""
    parts = []
    words = {"patch": "smaller patches", "depth": "more depth", "width": "more width"}
    for varied, lines in slices(plot).items():
        total, least, most = per_doubling(lines)
        span = f" ({most:+.0%} to {least:+.0%} in {len(lines)} comparisons)" if len(lines) > 1 else ""
        parts.append((total, f"{total:+.0%} through {words[varied]}{span}"))
    if not parts:
        return ""
    return f"Doubling gmacs changes {plot.name} by {', by '.join(text for _, text in sorted(parts))}."


def text_table(folder: StudyFolder, plot: View) -> str:
    """Returns configurations by gmacs in columns of text, with the mean and range of their seeds."""
    metric, lower = folder.study["metric"], folder.study["lower_is_better"]
    rows = [["", *COLUMNS, "params", "gmacs", "train_flops", metric]]
    for _, point in plot.last.iterrows():
        mean, low, high = (v if lower else 1 - v for v in (point["y"], point["low"], point["high"]))
        spread = f" ({min(low, high):.4g} to {max(low, high):.4g}, {point['seeds']} seeds)"
        facts = ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else f"{v}" for v in point[COLUMNS]]
        costs = [f"{point['params']:,}", f"{point['gmacs']:.3g}", f"{point['train_flops']:.3g}"]
        rows.append([point["point"], *facts, *costs, f"{mean:.4g}{spread * (point['seeds'] > 1)}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
