"""Layer-wise decay of the learning rate: how far each parameter is from the head.

Blocks are stacked [L, ...], so that each row of a stacked parameter has its own layer.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling.errors import UserError
from scaling.parallel.sharding import path_of

FIRST = r"^(patch|positions|token|norm_patch|stem|norm_stem)(/|$)"  # parameters before the blocks
LAST = r"^(norm|head)/"  # parameters after the blocks
MERGING = r"^merging(\d+)/"  # a merging layer counts to the block before it
BLOCK_PATTERN = r"^(?:stage(\d+)/)?(plain|shifted|first|blocks)/"  # blocks, of a numbered stage if any


def multiple(keys: tuple[Any, ...], params: Any, decay: float) -> np.ndarray:
    """Returns decay^(L + 1 - layer) for the parameter at `keys`: [] float32, or [rows, 1, ...] if stacked.

    The L blocks, of all stages together, are layers 1 to L; parameters before them are layer 0, the last norm
    and the head layer L + 1 (Bao et al. 2022, "BEiT", arXiv:2106.08254, section 3.2; Swin's as in SimMIM's
    code).

    Raises:
        UserError: for a parameter that is none of these.
    """
    path = path_of(keys)
    total = sum(_count_blocks(stage) for stage in _stages(params).values())
    leaf: Any = params
    for key in keys:
        leaf = leaf[key.key]
    layer = _layer(path, params, total, len(leaf) if leaf.ndim else 1)
    power = np.float32(decay) ** (total + 1 - np.asarray(layer, np.float32))
    return power.reshape(power.shape + (1,) * (leaf.ndim - 1 if power.ndim else 0)).astype(np.float32)


def check(params: Any) -> None:
    """Checks that the layer of every parameter (or shape) is known.

    Raises:
        UserError: for a parameter whose layer is not known.
    """
    for keys, _ in jax.tree_util.tree_leaves_with_path(params):
        multiple(keys, params, 1.0)


def _layer(path: str, params: Any, total: int, rows: int) -> int | np.ndarray:
    if re.search(FIRST, path):
        return 0
    if re.search(LAST, path):
        return total + 1
    stages = _stages(params)
    if match := re.search(MERGING, path):
        return sum(_count_blocks(blocks) for stage, blocks in stages.items() if stage < int(match[1]))
    if match := re.search(BLOCK_PATTERN, path):
        stage, kind = int(match[1] or 1), match[2]
        before = sum(_count_blocks(blocks) for other, blocks in stages.items() if other < stage)
        if kind == "first":
            return before + 1
        if kind == "blocks":  # the blocks of a ResNet's stage after its first
            return before + 1 + ("first" in stages[stage]) + np.arange(rows)
        return before + 1 + (kind == "shifted") + 2 * np.arange(rows)
    raise UserError(
        f"optimizer.layer_decay: knows the layers of resnet, vit and swin, not that of {path}; leave it at 1"
    )


def _stages(params: Any) -> dict[int, Mapping[str, Any]]:
    """Returns the stacks of blocks of each stage, by its number; a model without stages has stage 1."""
    if "blocks" in params:
        return {1: {"blocks": params["blocks"]}}
    matches = {re.fullmatch(r"stage(\d+)", name): blocks for name, blocks in params.items()}
    return {int(match[1]): blocks for match, blocks in matches.items() if match}


def _count_blocks(stage: Mapping[str, Any]) -> int:
    """Returns the number of blocks of a stage."""
    return sum(1 if kind == "first" else len(jax.tree.leaves(stack)[0]) for kind, stack in stage.items())
