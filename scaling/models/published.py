"""Published sizes and costs, as printed: parameters in millions, and Gmacs of one forward pass.

The papers print Gmacs as "Gflops". DiT's add one operation for each LayerNorm element, timm's add
normalisation and activations: both lie within 1 % of matrix products and convolutions alone.
"""

from typing import Any, NamedTuple


class Figure(NamedTuple):
    params_m: float
    gmacs: float
    source: str


DIT = "Peebles & Xie 2023, table 4"
TIMM = "timm model cards"

# By family, variant and options, as in the family's VARIANTS.
FIGURES: dict[str, list[tuple[str, dict[str, Any], Figure]]] = {
    "dit": [
        ("S/8", {}, Figure(33, 0.36, DIT)),
        ("S/4", {}, Figure(33, 1.41, DIT)),
        ("S/2", {}, Figure(33, 6.06, DIT)),
        ("B/8", {}, Figure(131, 1.42, DIT)),
        ("B/4", {}, Figure(130, 5.56, DIT)),
        ("B/2", {}, Figure(130, 23.01, DIT)),
        ("L/8", {}, Figure(459, 5.01, DIT)),
        ("L/4", {}, Figure(458, 19.70, DIT)),
        ("L/2", {}, Figure(458, 80.71, DIT)),
        ("XL/8", {}, Figure(676, 7.39, DIT)),
        ("XL/4", {}, Figure(675, 29.05, DIT)),
        ("XL/2", {}, Figure(675, 118.64, DIT)),
        ("XL/2", {"block": "in-context"}, Figure(449, 119.37, DIT)),
        ("XL/2", {"block": "cross-attention"}, Figure(598, 137.62, DIT)),
        ("XL/2", {"block": "adaln"}, Figure(600, 118.56, DIT)),
    ],
    "vit": [
        ("Ti/16", {}, Figure(5.72, 1.26, TIMM)),
        ("S/16", {}, Figure(22.05, 4.61, TIMM)),
        ("B/32", {}, Figure(88.22, 4.41, TIMM)),
        ("B/16", {}, Figure(86.57, 17.58, TIMM)),
        ("B/16", {"resolution": 384}, Figure(86.86, 55.54, TIMM)),
        ("L/16", {}, Figure(304.33, 61.60, TIMM)),
        ("H/14", {}, Figure(632.05, 167.40, TIMM)),
    ],
}


def figure(family: str, variant: str, options: dict[str, Any]) -> Figure | None:
    """The published figure of a registered variant; None where there is none."""
    return next((f for name, opts, f in FIGURES.get(family, []) if (name, opts) == (variant, options)), None)
