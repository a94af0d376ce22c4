"""A study in words: the answer with its interval, what to be careful about, and a plain table."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from scaling.study.laws import PERCENT
from scaling.study.results import Run, StudyFolder
from scaling.study.view import View, per_doubling, slices

SHOWN = ["depth", "width", "patch", "tokens"]  # in the plain table
WEAK = 0.9  # rank correlation (absolute) below which "falls with gmacs" is not said


def answers(folder: StudyFolder, laws: Mapping[str, Any], shown: View) -> list[str]:
    """What the study found, most important first; empty if there is nothing to tell yet."""
    if not len(shown.last):
        return []
    found = [_trend(laws, shown), _law(laws["gmacs"], shown.name, "gmacs", "gmacs"), _choices(shown)]
    best = shown.last.sort_values("y").iloc[0]
    value = best["y"] if folder.study["lower_is_better"] else 1 - best["y"]
    found.append(
        f"The best configuration is {best['point']}: {folder.study['metric']} {value:.4g} "
        f"with {best['gmacs']:.3g} gmacs."
    )
    found.append(_law(laws["train_flops"], shown.name, "training compute (along the frontier)", "FLOPs"))
    return [text for text in found if text]


def caveats(folder: StudyFolder, laws: Mapping[str, Any], shown: View) -> list[str]:
    """What a reader has to know before using the answer."""
    found = []
    unfinished = [f"{run.name} {run.status}{reason(run)}" for run in folder.runs if run.status != "done"]
    if unfinished:
        count = f"{len(unfinished)} of {len(folder.runs)} runs"
        found.append(f"{count} are not done, and missing at the last step: {'; '.join(unfinished)}.")
    if folder.study["metric"] not in folder.table:
        found.append(f"No run has been evaluated for {folder.study['metric']} yet.")
        return found
    if len(shown.last) and shown.last["seeds"].max() == 1:
        found.append("One seed a configuration: differences between neighbours may be chance.")
    for x, law in (("gmacs", laws["gmacs"]), ("training compute", laws["train_flops"])):
        predictions = law.get("held_out", {}).get("predictions", [])
        missed = [p for p in predictions if not p["interval"][0] <= p["actual"] <= p["interval"][1]]
        if missed:
            found.append(
                f"Against {x} the law does not extrapolate well: {len(missed)} of {len(predictions)} "
                f"held-out values lie outside their {PERCENT} interval."
            )
    if shown.floor is not None:
        floor = f"Real data measured against real data gives {shown.floor:.3g}"
        found.append(f"{floor}: a model cannot be expected to get below it.")
    return found


def reason(run: Run) -> str:
    """Why a run is not done, or how far it is."""
    return f": {run.reason}" if run.reason else f" at step {run.step} of {run.steps}" if run.steps else ""


def _trend(laws: Mapping[str, Any], shown: View) -> str:
    rho, law = laws["spearman"], laws["gmacs"]
    if rho is None:
        return f"{len(shown.last)} configurations are done: too few to tell a trend."
    points = f"rank correlation {rho:.2f} over {len(shown.last)} configurations"
    if rho > -WEAK:
        return f"{shown.name} does not fall clearly with gmacs ({points})."
    if "slope" not in law:
        return f"{shown.name} falls with gmacs ({points})."
    low, high = (1 - 2**-s for s in law["slope_interval"])
    return (
        f"{shown.name} falls with gmacs: each doubling lowers it by about {1 - 2 ** -law['slope']:.0%} "
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
    held = law["held_out"]
    if "predictions" not in held:
        return f"{text} No prediction was tested: {held['reason']}."
    errors = ", ".join(f"{p['error']:+.0%}" for p in held["predictions"])
    without = " and ".join(held["left_out"])
    return f"{text} Fitted without {without}, it predicts their values with an error of {errors}."


def _choices(shown: View) -> str:
    """What the same compute buys when it goes into smaller patches, depth or width."""
    parts = []
    words = {"patch": "smaller patches", "depth": "more depth", "width": "more width"}
    for varied, lines in slices(shown).items():
        total, least, most = per_doubling(lines)
        span = f" ({most:+.0%} to {least:+.0%} in {len(lines)} comparisons)" if len(lines) > 1 else ""
        parts.append((total, f"{total:+.0%} through {words[varied]}{span}"))
    if not parts:
        return ""
    return f"Doubling gmacs changes {shown.name} by {', by '.join(text for _, text in sorted(parts))}."


def text_table(folder: StudyFolder, shown: View) -> str:
    """Configurations by gmacs in columns of text, seeds averaged, with their range."""
    metric, lower = folder.study["metric"], folder.study["lower_is_better"]
    rows = [["", *SHOWN, "params", "gmacs", "train_flops", metric]]
    for _, point in shown.last.iterrows():
        mean, low, high = (v if lower else 1 - v for v in (point["y"], point["low"], point["high"]))
        spread = f" ({min(low, high):.4g} to {max(low, high):.4g}, {point['seeds']} seeds)"
        facts = ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else f"{v}" for v in point[SHOWN]]
        costs = [f"{point['params']:,}", f"{point['gmacs']:.3g}", f"{point['train_flops']:.3g}"]
        rows.append([point["point"], *facts, *costs, f"{mean:.4g}{spread * (point['seeds'] > 1)}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
