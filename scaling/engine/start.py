"""A run that begins with another run's weights (`train.start`): at step 0, and not when it is resumed."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scaling import models
from scaling.engine import build, features, sharding, state
from scaling.errors import UserError


def begin(built: build.Built) -> tuple[state.State, str]:
    """The state of step 0, each array where the mesh has it, and what is to be said of where it comes from.

    Raises: UserError where `train.start` is no trained run, or one whose weights do not fit.
    """
    fresh, folder = state.init(built), built.config.train.start
    if folder is None:
        return fresh, ""
    try:
        source = features.restore(folder)
        _require_same_images(built, source)
        params, collections, kept = carried(built, fresh.params, fresh.collections, source)
    except UserError as e:
        raise UserError(f"train.start={folder!r}: {e}") from None
    said = f"starts from {folder} at step {source.step}"
    said += f"; new are {', '.join(kept)}" if kept else ""
    return state.with_weights(fresh, params, collections), said


def _require_same_images(built: build.Built, source: features.Trained) -> None:
    """Raises UserError where this run would show the source's weights other numbers than they saw."""
    seen, ours = source.built.config.preprocessing, built.config.preprocessing
    if seen != ours:
        raise UserError(
            f"its weights saw images less {seen.mean}, by {seen.std}; here preprocessing.mean={ours.mean}; "
            f'give --config.preprocessing.mean="{seen.mean}" --config.preprocessing.std="{seen.std}"'
        )


def carried(
    built: build.Built, params: Any, collections: Any, source: features.Trained
) -> tuple[Any, Any, list[str]]:
    """Params and collections with what the source's weights have for them, and what there was nothing for.

    A model of the same family takes all, its position tables resized where the family can, and its head too
    if the classes are as many. From a ViT, `from_vit` of the model's own module says what is taken.

    Raises: UserError where the families or shapes differ.
    """
    ours, theirs = built.config.model.name, source.built.config.model.name
    given = {**source.weights["collections"], "params": source.weights["params"]}
    if ours == theirs:
        new = _same_family(built.model, source.built.model, models.module(ours), given)
        if hasattr(models.module(ours), "fit_heads"):
            new["params"] = models.module(ours).fit_heads(params, new["params"])
        if "head" in params and _shapes(new["params"].get("head")) != _shapes(params["head"]):
            new["params"] = {**new["params"], "head": params["head"]}
        taken, rest = new.pop("params"), {**collections, **new}
    elif theirs == "vit" and hasattr(models.module(ours), "from_vit"):
        rule = models.module(ours).from_vit
        taken, rest = rule(built.model, params, source.built.model, given["params"]), collections
    else:
        fit = f"{ours} or vit" if hasattr(models.module(ours), "from_vit") else ours
        raise UserError(f"is a run of {theirs}, which {ours} cannot start from; give one of {fit}")
    if built.config.train.start_only:
        taken = _only(built.config.train.start_only, params, taken)
    _check(params, taken)
    _check(collections, rest)
    return taken, rest, _kept(params, taken)


def _same_family(model: Any, source: Any, module: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    grids = [name for name in ("resolution", "frames") if hasattr(model, name)]
    differ = any(getattr(model, name) != getattr(source, name) for name in grids)
    if differ and hasattr(module, "resized"):
        return dict(module.resized(given, source, model)[0])
    return dict(given)


def _only(pattern: str, fresh: Any, taken: Any) -> Any:
    """`fresh` with those of the taken parameters whose paths the pattern finds."""
    before, after = flatten_dict(fresh, sep="/"), flatten_dict(taken, sep="/")
    found = {path: x for path, x in after.items() if re.search(pattern, path)}
    if not found:
        raise UserError(
            f"train.start_only={pattern!r}: finds none of the parameters, such as {next(iter(after))}"
        )
    return unflatten_dict(before | found, sep="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(path): tuple(np.shape(leaf)) for path, leaf in leaves}


def _check(expected: Any, found: Any) -> None:
    """Raises UserError, naming the first of the arrays that differ, unless all shapes are as expected."""
    want, have = _shapes(expected), _shapes(found)
    wrong = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(want)} arrays do not fit; {first} is {have.get(first, 'absent')} there, "
            f"and {want.get(first, 'absent')} here; give a run of the same sizes"
        )


def _kept(fresh: Any, taken: Any) -> list[str]:
    """The top-level parameters of which nothing was taken."""
    same = jax.tree.map(lambda a, b: a is b, fresh, taken)
    return [name for name in fresh if all(jax.tree.leaves(same[name]))]
