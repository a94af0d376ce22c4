"""`scaling predict W`: what a configuration that was not trained would reach, and how far to trust that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.laws.belief import INTERVAL, summary
from scaling.study.evidence import evidence
from scaling.study.laws import LAWS, Law, laws_of, named
from scaling.study.question import Question, ask, choose, study_folder
from scaling.study.sweep import Overrides

PREDICTED, TOO_WIDE, REFUTED = "predicted", "too wide", "refuted"  # verdicts


def predict(
    workdir: Path, overrides: Overrides, seeds: int = 1, tolerance: float | None = None
) -> dict[str, Any]:
    """Predicts the study's metric for the mean of some seeds of a configuration.

    Args:
        workdir: the study folder.
        overrides: how the configuration differs from the study's largest.
        seeds: number of runs whose mean is asked for.
        tolerance: how near the truth the prediction has to be, as a share of y (default: the study's).

    Returns:
        `value`, `low` and `high` of the metric; `verdict` (predicted, too wide or refuted) and `reason`;
        `law`, `x`, `beyond` (x in units of the largest measured), and `facts`, what the configuration costs.

    Raises:
        UserError: if no law covers the question.
    """
    folder = study_folder(workdir)
    (question,) = ask(folder, [overrides])
    found = evidence(folder)
    law = choose(laws_of(found), question)
    allowed = folder.study["tolerance"] if tolerance is None else tolerance
    return answer(law, question, seeds, allowed)


def answer(law: Law, question: Question, seeds: int, tolerance: float) -> dict[str, Any]:
    """Returns what a law says of a question, as `predict` does."""
    belief, metric = law.belief, law.evidence.metric
    assert belief is not None
    x = question.x(law)
    draws = belief.runs(x, seeds)[:, 0]
    y = summary(draws)
    verdict, reason = _verdict(law, y, tolerance)
    ends = sorted(metric.value(y[name]) for name in ("low", "high"))
    beyond, names = (x / belief.values.x.max(0))[0], LAWS[law.name][0]
    return {
        "metric": metric.name, "value": metric.value(y["value"]), "low": ends[0], "high": ends[1],
        "interval": INTERVAL, "seeds": seeds, "verdict": verdict, "reason": reason,
        "law": named({"x": names, "group": law.group}),
        "x": dict(zip(names, x[0].tolist(), strict=True)),
        "beyond": dict(zip(names, beyond.tolist(), strict=True)),
        "overrides": question.overrides, "facts": dict(question.facts),
    }  # fmt: skip


def _verdict(law: Law, y: Mapping[str, float], tolerance: float) -> tuple[str, str]:
    """Returns the verdict on a prediction, and its reason."""
    up, down = y["high"] / y["value"] - 1, 1 - y["low"] / y["value"]
    label, width = law.evidence.metric.label, f"+{up:.1%}, −{down:.1%}"
    if law.refutation:
        return REFUTED, law.refutation
    if max(up, down) > tolerance:
        return TOO_WIDE, f"{label} is known to {width}, and {tolerance:.0%} was asked for; see scaling advise"
    return PREDICTED, f"{label} is known to {width}, within {tolerance:.0%}; nothing refutes the law"


def text(prediction: Mapping[str, Any]) -> str:
    """Returns a prediction as lines to read."""
    p, facts = prediction, prediction["facts"]
    asked = ", ".join(f"{key}={value!r}" for key, value in p["overrides"].items())
    beyond = ", ".join(f"{ratio:.2g} × the largest {name}" for name, ratio in p["beyond"].items())
    costs = [f"{facts['gmacs']:.4g} gmacs", f"{facts['params']:,.0f} params"]
    costs += [f"{facts['tokens']:.0f} tokens"] if "tokens" in facts else []
    costs += [f"{facts['examples']:,.0f} examples", f"{facts['train_flops']:.3g} FLOPs of training"]
    runs = "one run" if p["seeds"] == 1 else f"the mean of {p['seeds']} runs"
    return "\n".join([
        f"{p['metric']} {p['value']:.4g}, {p['interval']:.0%}: {p['low']:.4g} to {p['high']:.4g} for {runs}",
        f"{p['verdict']}: {p['reason']}",
        f"law in {p['law']}, at {beyond}",
        f"configuration: {asked}",
        f"cost: {', '.join(costs)}",
    ])  # fmt: skip
