"""The compute-optimal frontier of a joint law: which size and how much data a budget is best spent on.

With y = E + A N^-alpha + B D^-beta and a cost C = k N D, the best N is G (C / k)^(beta / (alpha + beta)),
G = (alpha A / (beta B))^(1 / (alpha + beta)) (Hoffmann et al. 2022, eq. 4).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.belief import Belief

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Optimal:
    """Draws of the frontier: sizes N, data D and values y, each [P, M], at M budgets; its exponents, [P]."""

    size: Array
    data: Array
    y: Array
    exponents: Mapping[str, Array]


def optimal(belief: Belief, budgets: Array, cost: float) -> Optimal:
    """Returns the frontier of a joint law at budgets C [M], where training costs C = cost * N * D.

    Returns:
        Among the exponents, `size` and `data` are those of C in N and D, and `y` that of y - E.

    Raises:
        UserError: if the law is of another form.
    """
    if belief.form.name != "joint":
        raise UserError(f"form={belief.form.name!r}: has no compute-optimal frontier; the form joint has")
    p = belief.parameters
    alpha, beta = p["alpha"], p["beta"]
    factor = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    exponents = {
        "size": beta / (alpha + beta),
        "data": alpha / (alpha + beta),
        "y": alpha * beta / (alpha + beta),
    }
    size = factor[:, None] * (budgets / cost) ** exponents["size"][:, None]
    data = budgets / cost / size
    y = p["E"][:, None] + p["A"][:, None] * size ** -alpha[:, None] + p["B"][:, None] * data ** -beta[:, None]
    return Optimal(size, data, y, exponents)
