"""`scaling compare W1 W2`: which of two studies, or families, is better at equal compute, and how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.belief import INTERVAL, summary
from scaling.laws.optimal import optimal
from scaling.study.evidence import evidence
from scaling.study.laws import Law, laws_of
from scaling.study.question import study_folder

Array = NDArray[np.float64]

AXES = {"gmacs": "gmacs", "train_flops": "examples"}  # axis -> the law that has it
FACTORS = np.geomspace(1 / 64, 64, 241)  # of compute, among which that of equal quality is sought


@dataclass(frozen=True)
class Side:
    """One of those that are compared: a study, or one family of it."""

    name: str
    law: Law
    axis: str

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest compute that was measured."""
        values = self.law.table[self.axis]
        return float(values.min()), float(values.max())

    def curve(self, x: Array) -> Array:
        """Returns draws of y [P, N] at amounts of compute [N]; of the best sizes, for training compute."""
        belief = self.law.belief
        assert belief is not None
        if self.axis == "gmacs":
            return belief.curve(x[:, None])
        return optimal(belief, x, self.law.cost).y


def compare(workdirs: Sequence[Path], axis: str = "gmacs") -> list[dict[str, Any]]:
    """Compares studies, and the families of each, by their laws.

    Args:
        workdirs: study folders.
        axis: `gmacs`, of a forward pass; or `train_flops`, where each study has a law in size and examples.

    Returns:
        For each pair: `first`, `second`, and `better`, if one surely is; and at the ends and the middle of
        the compute that both have, `at`: the `ratio` of the first's y to the second's (below 1 the first is
        better), the `probability` that the first is better, and `worth`, the factor of compute, from 1/64 to
        64, with which the second is as good as the first.

    Raises:
        UserError: if there are no two to compare, their metrics differ, or they share no range of compute.
    """
    sides = [side for path in workdirs for side in _sides(path, axis, len(workdirs) > 1)]
    if len(sides) < 2:
        raise UserError(
            f"{', '.join(map(str, workdirs))}: one study of one family; give another to compare it with"
        )
    labels = {side.law.evidence.metric.label for side in sides}
    if len(labels) > 1:
        raise UserError(f"the metrics differ: {', '.join(sorted(labels))}; compare studies of one metric")
    return [_pair(first, second) for first, second in combinations(sides, 2)]


def _sides(path: Path, axis: str, several: bool) -> list[Side]:
    folder = study_folder(path)
    sides, reasons = [], []
    for law in laws_of(evidence(folder)):
        if law.name != AXES[axis]:
            continue
        name = " ".join([str(path)] * several + [law.group] * bool(law.group)) or str(path)
        if law.belief is not None:
            sides.append(Side(name, law, axis))
        else:
            reasons.append(str(law.reason))
    if not sides:
        raise UserError(f"{path}: no law to compare by: {reasons[0] if reasons else f'none is in {axis}'}")
    return sides


def _pair(first: Side, second: Side) -> dict[str, Any]:
    low, high = max(first.range[0], second.range[0]), min(first.range[1], second.range[1])
    if low >= high:
        ranges = ", and ".join(f"{side.range[0]:.3g} to {side.range[1]:.3g}" for side in (first, second))
        raise UserError(f"{first.name} and {second.name}: share no range of {first.axis}; {ranges}")
    at = np.geomspace(low, high, 3)
    rng = np.random.default_rng(0)
    mine, others = first.curve(at), second.curve(at)
    count = min(len(mine), len(others))
    mine, others = (rng.permutation(draws)[:count] for draws in (mine, others))
    likely = (mine < others).mean(0)
    rows = [
        {
            first.axis: float(x),
            "ratio": summary(mine[:, i] / others[:, i]),
            "probability": float(likely[i]),
            "worth": _worth(float(x), mine[:, i], second, rng),
        }
        for i, x in enumerate(at)
    ]
    better = first.name if likely[1] >= INTERVAL else second.name if likely[1] <= 1 - INTERVAL else None
    return {
        "first": first.name, "second": second.name, "metric": first.law.evidence.metric.name,
        "axis": first.axis, "better": better, "at": rows,
        "examples": [_examples(side) for side in (first, second)],
    }  # fmt: skip


def _worth(x: float, wanted: Array, other: Side, rng: np.random.Generator) -> dict[str, float]:
    """Returns the factor of compute, from 1/64 to 64, with which the other reaches what was wanted [P]."""
    curves = rng.permutation(other.curve(x * FACTORS))[: len(wanted)]  # [P, F], falling
    factors = np.array([
        np.exp(np.interp(-goal, -curve, np.log(FACTORS)))
        for goal, curve in zip(np.log(wanted), np.log(curves), strict=True)
    ])  # fmt: skip
    return summary(factors)


def _examples(side: Side) -> float | None:
    """Returns the number of examples that the runs of a law in gmacs saw."""
    examples = side.law.table["examples"].dropna()
    return None if side.axis != "gmacs" or examples.empty else float(examples.median())


def text(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Returns comparisons as lines to read."""
    lines = []
    for pair in pairs:
        said = f"{pair['better']} is better" if pair["better"] else "neither is surely better"
        lines.append(f"{pair['first']} against {pair['second']}, {pair['metric']} by {pair['axis']}: {said}")
        for row in pair["at"]:
            ratio, worth = row["ratio"], row["worth"]
            lines.append(
                f"  at {row[pair['axis']]:.3g}: ratio {ratio['value']:.3f} ({ratio['low']:.3f} to "
                f"{ratio['high']:.3f}), the first is better with probability {row['probability']:.2f}; worth "
                f"{worth['value']:.2g} × the second's compute ({worth['low']:.2g} to {worth['high']:.2g})"
            )
        first, second = pair["examples"]
        if first and second and abs(first / second - 1) > 0.005:
            lines.append(f"  mind that their runs saw {first:,.0f} and {second:,.0f} examples")
    return "\n".join(lines)
