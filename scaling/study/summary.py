"""A study in words: the answer with its interval, what to be careful about, and a plain table."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from scaling.study.laws import PERCENT, describe, law_in, named
from scaling.study.plot_data import View, per_doubling, slices
from scaling.study.results import RunRecord, StudyFolder

COLUMNS = ["depth", "width", "patch", "tokens"]  # facts in the plain table
WEAK = 0.9  # absolute rank correlation below which the report does not say "falls with gmacs"


def answers(folder: StudyFolder, laws: Mapping[str, Any], plot: View) -> list[str]:
    """Returns what the study found, most important first; empty if no configuration is done yet."""
    if not len(plot.last):
        return []
    metric = folder.metric
    best = plot.last.sort_values("y").iloc[0]
    texts = [
        *_trend(laws, plot),
        *(_law(law, plot.name) for law in laws["laws"]),
        _choices(plot),
        f"The best configuration is {best['point']}: {metric.name} {metric.value(best['y']):.4g} "
        f"with {best['gmacs']:.3g} gmacs.",
    ]
    return [text for text in texts if text]


def caveats(folder: StudyFolder, laws: Mapping[str, Any], plot: View) -> list[str]:
    """Returns what a reader has to know before using the answer."""
    texts = []
    unfinished = [f"{run.name} {run.status}{reason(run)}" for run in folder.runs if run.status != "done"]
    if unfinished:
        count = f"{len(unfinished)} of {len(folder.runs)} runs"
        texts.append(f"{count} are not done, and missing at the last step: {'; '.join(unfinished)}.")
    if folder.metric.name not in folder.table:
        texts.append(f"No run has been evaluated for {folder.metric.name} yet.")
        return texts
    if len(plot.last) and plot.last["seeds"].max() == 1:
        texts.append("One seed per configuration: differences between neighbours may be chance.")
    texts += [
        f"The law in {named(law)} does not hold: {law['refutation']}."
        for law in laws["laws"]
        if law.get("refutation")
    ]
    texts += [f"Law in {named(law)}: {note}." for law in laws["laws"] for note in law.get("notes", ())]
    if len(plot.last) and not law_in(laws, "examples"):
        texts.append(
            "All values are of one duration, so nothing is said about others, nor about the best size for a "
            "budget; vary train.duration, or keep a constant learning rate, for a law in size and examples."
        )
    if plot.floor is not None:
        floor = f"Real data measured against real data gives {plot.floor:.3g}"
        texts.append(f"{floor}: a model cannot be expected to get below it.")
    return texts


def reason(run: RunRecord) -> str:
    """Returns why a run is not done, or how far it is."""
    return f": {run.reason}" if run.reason else f" at step {run.step} of {run.steps}" if run.steps else ""


def _trend(laws: Mapping[str, Any], plot: View) -> list[str]:
    rho, pearson = laws["spearman"], laws["pearson"]
    if rho is None:
        return [f"{len(plot.last)} configurations are done: too few to tell a trend."]
    points = f"of logarithms {pearson:.2f}, of ranks {rho:.2f}, over {len(plot.last)} configurations"
    if rho > -WEAK:
        return [f"{plot.name} does not fall clearly with gmacs (correlation {points})."]
    falls = [f"{_falls(law['doubling'])}{_of(law)}" for law in law_in(laws, "gmacs") if "doubling" in law]
    each = f": each doubling lowers it by about {'; '.join(falls)}, within the range tested" if falls else ""
    return [f"{plot.name} falls with gmacs{each} (correlation {points})."]


def _falls(doubling: Mapping[str, float]) -> str:
    return f"{doubling['value']:.0%} ({PERCENT} interval {doubling['low']:.0%} to {doubling['high']:.0%})"


def _of(law: Mapping[str, Any]) -> str:
    return f" for {law['group']}" if law["group"] else ""


def _law(law: Mapping[str, Any], name: str) -> str:
    """Returns a law in words: its formula, its exponents, and how it predicts the largest configurations."""
    if "reason" in law:
        return f"No law in {named(law)}: {law['reason']}."
    text = f"Law in {named(law)}: {law['formula']}, y = {name}; {describe(law)}."
    if law.get("optimal"):
        size, y = (law["optimal"]["exponents"][key] for key in ("size", "y"))
        text += (
            f" For a budget of training compute C, the best gmacs grow as C^{size['value']:.2f} "
            f"({size['low']:.2f} to {size['high']:.2f}), and y falls to E as C^−{y['value']:.2f} "
            f"({y['low']:.2f} to {y['high']:.2f})."
        )
    if law["held_out"] is None:
        return f"{text} No prediction was tested: too few configurations remain without the largest."
    predictions = law["held_out"]["predictions"]
    held = sum(p["low"] <= p["actual"] <= p["high"] for p in predictions)
    errors = ", ".join(f"{p['error']:+.0%}" for p in predictions)
    points = ", ".join(p["point"] for p in predictions)
    return (
        f"{text} Fitted without the largest fifth, it predicts {points} with an error of {errors}; "
        f"{held} of {len(predictions)} lie in their {PERCENT} intervals."
    )


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
    metric = folder.metric
    rows = [["", *COLUMNS, "params", "gmacs", "train_flops", metric.name]]
    for _, point in plot.last.iterrows():
        mean, low, high = (metric.value(v) for v in (point["y"], point["low"], point["high"]))
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
