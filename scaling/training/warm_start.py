"""Starts a run from another run's weights (`train.init_from`) or whole state (`train.continue_from`).

A run that is resumed starts from neither.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scaling import models
from scaling.errors import UserError
from scaling.models.base import Family
from scaling.parallel import sharding
from scaling.run import build, restore, state
from scaling.run.checkpoint import Checkpoints


def initial_state(run: build.Run) -> tuple[state.State, int, str]:
    """Returns the first state, sharded on the run's mesh, its step, and a message about its origin.

    The message is "" if the state is fresh.

    Raises:
        UserError: if `train.init_from` or `train.continue_from` is no trained run, or its arrays do not fit.
    """
    if run.config.train.continue_from is not None:
        return _continued(run, Path(run.config.train.continue_from))
    fresh, folder = state.init(run), run.config.train.init_from
    if folder is None:
        return fresh, 0, ""
    try:
        source = restore.restore_run(folder)
        _require_same_images(run, source)
        params, collections, fresh_names = transfer_matching(run, fresh.params, fresh.collections, source)
    except UserError as e:
        raise UserError(f"train.init_from={folder!r}: {e}") from None
    message = f"starts from {folder} at step {source.step}"
    message += f"; new are {', '.join(fresh_names)}" if fresh_names else ""
    return state.with_weights(fresh, params, collections), 0, message


def _continued(run: build.Run, folder: Path) -> tuple[state.State, int, str]:
    """Returns the whole state of another run, of its newest step or of the checkpoint that `folder` is."""
    step = int(folder.name) if folder.parent.name == "checkpoints" and folder.name.isdecimal() else None
    source = folder if step is None else folder.parent.parent
    key = f"train.continue_from={str(folder)!r}"
    try:
        with Checkpoints(source / "checkpoints", read_only=True) as checkpoints:
            restored = checkpoints.restore(state.abstract(run), step=step)
    except UserError as e:
        raise UserError(f"{key}: {e}") from None
    if restored is None:
        raise UserError(f"{key}: has no checkpoint yet; train it first")
    if restored[1] >= run.steps:
        raise UserError(f"{key}: is at step {restored[1]}, and this run ends at {run.steps}; make it longer")
    return *restored, f"goes on from {source} at step {restored[1]}"


def _require_same_images(run: build.Run, source: restore.RestoredRun) -> None:
    """Checks that this run's preprocessing is that of the source's weights.

    Raises:
        UserError: if it is another.
    """
    old, new = source.run.config.preprocessing, run.config.preprocessing
    if old != new:
        raise UserError(
            f"its weights saw images less {old.mean}, by {old.std}; here preprocessing.mean={new.mean}; "
            f'give --config.preprocessing.mean="{old.mean}" --config.preprocessing.std="{old.std}"'
        )


def transfer_matching(
    run: build.Run, params: Any, collections: Any, source: restore.RestoredRun
) -> tuple[Any, Any, list[str]]:
    """Returns params and collections with the source's weights where they match, and the names of the rest.

    A model of the same family takes all weights: its position tables are resized if the family supports it,
    and a head for another number of classes is re-initialised. From a ViT, `from_vit` of the model's own
    family decides which weights are taken. The third result lists the top-level parameters that stay fresh.

    Raises:
        UserError: if the families or shapes differ.
    """
    name, source_name = run.config.model.name, source.run.config.model.name
    family = models.family(name)
    weights = {**source.weights["collections"], "params": source.weights["params"]}
    if name == source_name:
        new = _resize_grids(run.model, source.run.model, family, weights)
        new["params"] = family.fit_heads(params, new["params"])
        if "head" in params and _shapes(new["params"].get("head")) != _shapes(params["head"]):
            new["params"] = {**new["params"], "head": params["head"]}
        new_params, new_collections = new.pop("params"), {**collections, **new}
    elif source_name == "vit" and family.from_vit:
        new_params = family.from_vit(run.model, params, source.run.model, weights["params"])
        new_collections = collections
    else:
        allowed = f"{name} or vit" if family.from_vit else name
        raise UserError(f"is a run of {source_name}, which {name} cannot start from; give one of {allowed}")
    if run.config.train.init_only:
        new_params = _take_matching(run.config.train.init_only, params, new_params)
    _require_same_shapes(params, new_params)
    _require_same_shapes(collections, new_collections)
    return new_params, new_collections, _unchanged(params, new_params)


def _resize_grids(model: Any, source: Any, family: Family[Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights of a source of the same family, resized to the model's resolution and frames."""
    grids = {"resolution", "frames"} & {field.name for field in dataclasses.fields(model)}
    differ = any(getattr(model, name) != getattr(source, name) for name in grids)
    return family.resized(weights, source, model)[0] if differ else dict(weights)


def _take_matching(pattern: str, fresh: Any, new: Any) -> Any:
    """Returns `fresh` with those of the new parameters whose paths match the pattern."""
    fresh_leaves, new_leaves = flatten_dict(fresh, sep="/"), flatten_dict(new, sep="/")
    matches = {path: x for path, x in new_leaves.items() if re.search(pattern, path)}
    if not matches:
        raise UserError(
            f"train.init_only={pattern!r}: finds none of the parameters, such as {next(iter(new_leaves))}"
        )
    return unflatten_dict(fresh_leaves | matches, sep="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(path): tuple(np.shape(leaf)) for path, leaf in leaves}


def _require_same_shapes(expected: Any, actual: Any) -> None:
    """Checks that two trees have arrays of the same shapes at the same paths.

    Raises:
        UserError: if they differ; it names the first array that does.
    """
    want, have = _shapes(expected), _shapes(actual)
    differing = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if differing:
        first = differing[0]
        raise UserError(
            f"{len(differing)} of {len(want)} arrays do not fit; "
            f"{first} is {have.get(first, 'absent')} there, and {want.get(first, 'absent')} here; "
            "give a run of the same sizes"
        )


def _unchanged(fresh: Any, new: Any) -> list[str]:
    """Returns the top-level parameters that stay entirely fresh."""
    same = jax.tree.map(lambda a, b: a is b, fresh, new)
    return [name for name in fresh if all(jax.tree.leaves(same[name]))]
