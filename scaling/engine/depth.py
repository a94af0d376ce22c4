"""How far each parameter is from the head, for rates that fall with depth.

Blocks are stacked [L, ...], so that a parameter of theirs has a layer for each row.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling.engine.sharding import path_of
from scaling.errors import UserError

FIRST = r"^(patch|positions|token|norm_patch|stem|norm_stem)(/|$)"  # before the blocks
LAST = r"^(norm|head)/"  # after them
MERGING = r"^merging(\d+)/"  # counts as the block before it
BLOCK = r"^(?:stage(\d+)/)?(plain|shifted|first|blocks)/"  # of a stage, or of the only one


def multiple(keys: tuple[Any, ...], params: Any, decay: float) -> np.ndarray:
    """decay^(L + 1 - layer) for the parameter at `keys`: [] float32, or [rows, 1, ...] of a stacked one.

    Of L blocks, in all stages together, the first is layer 1; what is before them is layer 0, the last norm
    and the head L + 1 (Bao et al. 2022, "BEiT", arXiv:2106.08254, section 3.2; Swin's as in SimMIM's code).

    Raises: UserError for a parameter that is none of these.
    """
    path = path_of(keys)
    total = sum(_blocks(stage) for stage in _stages(params).values())
    leaf: Any = params
    for key in keys:
        leaf = leaf[key.key]
    layer = _layer(path, params, total, len(leaf) if leaf.ndim else 1)
    power = np.float32(decay) ** (total + 1 - np.asarray(layer, np.float32))
    return power.reshape(power.shape + (1,) * (leaf.ndim - 1 if power.ndim else 0)).astype(np.float32)


def check(params: Any) -> None:
    """Raises UserError for parameters (or their shapes) whose layers are not known."""
    for keys, _ in jax.tree_util.tree_leaves_with_path(params):
        multiple(keys, params, 1.0)


def _layer(path: str, params: Any, total: int, rows: int) -> int | np.ndarray:
    if re.search(FIRST, path):
        return 0
    if re.search(LAST, path):
        return total + 1
    stages = _stages(params)
    if found := re.search(MERGING, path):
        return sum(_blocks(blocks) for stage, blocks in stages.items() if stage < int(found[1]))
    if found := re.search(BLOCK, path):
        stage, kind = int(found[1] or 1), found[2]
        before = sum(_blocks(blocks) for other, blocks in stages.items() if other < stage)
        if kind == "first":
            return before + 1
        if kind == "blocks":  # of a ResNet's stage, after its first
            return before + 1 + ("first" in stages[stage]) + np.arange(rows)
        return before + 1 + (kind == "shifted") + 2 * np.arange(rows)
    raise UserError(
        f"optimizer.layer_decay: knows the layers of resnet, vit and swin, not that of {path}; leave it at 1"
    )


def _stages(params: Any) -> dict[int, Mapping[str, Any]]:
    """The kinds of blocks of each stage by its number; a model without stages is one."""
    if "blocks" in params:
        return {1: {"blocks": params["blocks"]}}
    named = {re.fullmatch(r"stage(\d+)", name): blocks for name, blocks in params.items()}
    return {int(found[1]): blocks for found, blocks in named.items() if found}


def _blocks(stage: Mapping[str, Any]) -> int:
    """How many blocks a stage has."""
    return sum(1 if kind == "first" else len(jax.tree.leaves(stack)[0]) for kind, stack in stage.items())
