"""Published sizes and costs, as printed: parameters in millions, and Gmacs of one forward pass.

The papers print Gmacs as "Gflops". DiT's figures add one operation per LayerNorm element, timm's add
normalisation and activations: both lie within 1 % of matmuls and convolutions alone. open_clip counts a
multiply-add as two, so that its figures are halved here. None stands for a figure that the source lacks.
"""

from typing import Any, NamedTuple


class Figure(NamedTuple):
    """Published size and cost of a model."""

    params_m: float  # parameters, in millions
    gmacs: float | None  # multiply-adds of one forward pass, in 1e9
    source: str


DIT = "Peebles & Xie 2023, table 4"
TIMM = "timm model cards"
OPEN_CLIP = "open_clip model profiles"
VIVIT = "Arnab et al. 2021, table 2, recomputed"
ADM = "Dhariwal & Nichol 2021, recomputed"
LDM = "Rombach et al. 2022, recomputed"

# Figures by family, variant and options, as in the family's VARIANTS.
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
    "resnet": [
        ("18", {}, Figure(11.69, 1.82, TIMM)),
        ("34", {}, Figure(21.80, 3.67, TIMM)),
        ("50", {}, Figure(25.56, 4.11, TIMM)),
        ("152", {}, Figure(60.19, 11.56, TIMM)),
    ],
    "swin": [
        ("T", {}, Figure(28.29, 4.51, TIMM)),
        ("S", {}, Figure(49.61, 8.77, TIMM)),
        ("B", {}, Figure(87.77, 15.47, TIMM)),
        ("L", {}, Figure(196.53, 34.53, TIMM)),
    ],
    "clip": [
        ("RN50", {}, Figure(102.01, 9.09, OPEN_CLIP)),
        ("RN101", {}, Figure(119.69, 12.75, OPEN_CLIP)),
        ("RN50x4", {}, Figure(178.30, 25.91, OPEN_CLIP)),
        ("RN50x16", {}, Figure(290.98, 81.345, OPEN_CLIP)),
        ("RN50x64", {}, Figure(623.26, 276.325, OPEN_CLIP)),
        ("ViT-B/32", {}, Figure(151.28, 7.39, OPEN_CLIP)),
        ("ViT-B/16", {}, Figure(149.62, 20.545, OPEN_CLIP)),
        ("ViT-L/14", {}, Figure(427.62, 87.665, OPEN_CLIP)),
        ("ViT-L/14", {"resolution": 336}, Figure(427.94, 197.61, OPEN_CLIP)),
    ],
    "vilt": [("B/32", {}, Figure(111.6, None, "Kim et al. 2021, with text embeddings and pooler"))],
    "vivit": [
        ("B/16x2", {}, Figure(88.95, 455.2, VIVIT)),
        ("B/16x2", {"attention": "factorised-encoder"}, Figure(115.1, 284.4, VIVIT)),
        ("B/16x2", {"attention": "factorised-self-attention"}, Figure(117.3, 372.3, VIVIT)),
        ("B/16x2", {"attention": "factorised-dot-product"}, Figure(88.95, 277.1, VIVIT)),
    ],
    "timesformer": [("B/16", {}, Figure(121.57, 196, "Bertasius et al. 2021, one view of three"))],
    "unet": [
        ("ADM-256", {}, Figure(554, 1120, ADM)),
        ("LDM-4", {}, Figure(400, 104, LDM)),
        ("LDM-8", {}, Figure(395, 57, LDM)),
    ],
}


def figure(family: str, variant: str, options: dict[str, Any]) -> Figure | None:
    """Returns the published figure of a registered variant, or None if there is none."""
    return next((f for name, opts, f in FIGURES.get(family, []) if (name, opts) == (variant, options)), None)
