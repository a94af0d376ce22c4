"""Layer-wise decay of the learning rate: how far each parameter is from the head.

Blocks are stacked [L, ...], so that each row of a stacked parameter has its own layer.
"""

import re
from typing import Any

import jax
import numpy as np

from scaling import models
from scaling.errors import UserError
from scaling.models.roles import Blocks
from scaling.parallel.sharding import path_of


def multiples(params: Any, decay: float) -> Any:
    """Returns decay^(L + 1 - layer) for each parameter (or shape): [] float32, or [rows, 1, ...] if stacked.

    The L blocks, of all stages together, are layers 1 to L; parameters before them are layer 0, those between
    two stages are of the layer before them, the last norm and the head are layer L + 1 (Bao et al. 2022,
    "BEiT", arXiv:2106.08254, section 3.2; Swin's as in SimMIM's code).

    Raises:
        UserError: for a parameter that is none of these.
    """
    depths = _stage_depths(params)
    total = sum(depths.values())

    def multiple(keys: tuple[Any, ...], leaf: Any) -> np.ndarray:
        layer = _layer(path_of(keys), leaf, depths)
        power = np.float32(decay) ** (total + 1 - np.asarray(layer, np.float32))
        return power.reshape(power.shape + (1,) * (leaf.ndim - 1 if power.ndim else 0)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(multiple, params)


def _layer(path: str, leaf: Any, depths: dict[int, int]) -> int | np.ndarray:
    """Returns a parameter's layer, or the layers of its rows if it is stacked."""
    place, total = models.role_of(path).place, sum(depths.values())
    before = sum(depth for stage, depth in depths.items() if stage < _stage(path))
    if isinstance(place, Blocks):
        return before + 1 + _numbers(place, leaf)
    layers = {"before": 0, "between": before, "after": total + 1}
    if place is None:
        raise UserError(
            f"optimizer.layer_decay: knows the layers of resnet, vit and swin, not that of {path}; "
            "leave it at 1"
        )
    return layers[place]


def _stage_depths(params: Any) -> dict[int, int]:
    """Returns the number of blocks of each stage."""
    depths: dict[int, int] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        place = models.role_of(path).place
        if isinstance(place, Blocks):
            last = int(np.max(_numbers(place, leaf)))
            depths[_stage(path)] = max(depths.get(_stage(path), 0), last + 1)
    return depths


def _stage(path: str) -> int:
    """Returns the number of the stage that a path begins with; a model without stages has stage 1."""
    match = re.search(r"\d+", path.partition("/")[0])
    return int(match[0]) if match else 1


def _numbers(place: Blocks, leaf: Any) -> int | np.ndarray:
    """Returns the numbers, within their stage, of the blocks that a parameter belongs to."""
    return place.first + place.step * np.arange(len(leaf)) if place.stacked else place.first
