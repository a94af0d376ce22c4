"""Former names of config keys and values, so that errors name the new ones and older runs can be read."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from scaling.errors import UserError

# (pattern of a former dotted key or section, current name), applied one after the other.
KEYS: tuple[tuple[str, str], ...] = (
    (r"evaluate", "evaluators"),
    (r"model\.family", "model.name"),
    (r"(evaluators\.[^.]+)\.kind", r"\1.name"),
    (r"(evaluators\.[^.]+)\.temporal", r"\1.num_clips"),
    (r"(evaluators\.[^.]+)\.spatial", r"\1.num_crops"),
    (r"(evaluators\.[^.]+)\.on", r"\1.inputs"),
    (r"(evaluators\.[^.]+)\.c", r"\1.inverse_l2"),
    (r"optimizer\.clip", "optimizer.grad_clip_norm"),
    (r"optimizer\.drops", "optimizer.lr_milestones"),
    (r"optimizer\.floor", "optimizer.final_lr_ratio"),
    (r"optimizer\.decay", "optimizer.weight_decay_mode"),
    (r"optimizer\.ema", "optimizer.ema_decays"),
    (r"optimizer\.rules", "optimizer.param_rules"),
    (r"((?:.+\.)?sampling)\.clip", r"\1.clip_denoised"),
    (r"((?:.+\.)?sampling)\.guidance", r"\1.guidance_scale"),
    (r"((?:.+\.)?data)\.augment", r"\1.train_transforms"),
    (r"((?:.+\.)?text)\.kind", r"\1.name"),
    (r"((?:.+\.)?text)\.vocabulary", r"\1.vocab_file"),
    (r"((?:.+\.)?text)\.size", r"\1.vocab_size"),
    (r"((?:.+\.)?text)\.length", r"\1.max_length"),
    (r"((?:.+\.)?text)\.too_long", r"\1.overflow"),
    (r"objective\.label_dropout", "objective.condition_dropout"),
    (r"train\.start", "train.init_from"),
    (r"train\.start_only", "train.init_only"),
)
# Former rules of parameters were (match, lr_scale, weight_decay, frozen); today's leave out these values.
RULE: dict[str, Any] = {"match": "", "lr_scale": 1.0, "weight_decay": None, "frozen": False}
VALUES = {"center_crop_90": "center_crop(0.9)", "center_crop_100": "center_crop(1)"}


def current_key(key: str) -> str:
    """Returns the current name of a dotted key."""
    for pattern, name in KEYS:
        key = re.sub(rf"^{pattern}(?=\.|$)", name, key)
    return key


def require_current(keys: Iterable[str]) -> None:
    """Checks that dotted keys have their current names.

    Raises:
        UserError: if one has a former name; the message gives its current one.
    """
    for key in keys:
        if current_key(key) != key:
            raise UserError(f"{key}: is now called {current_key(key)}")


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config of nested dicts with current keys and values."""
    return {current_key(key): _rename_within(value, current_key(key)) for key, value in config.items()}


def _rename_within(tree: Any, path: str) -> Any:
    if isinstance(tree, Mapping):
        new = {key: current_key(f"{path}.{key}") for key in tree}
        return {new[key].rpartition(".")[2]: _rename_within(value, new[key]) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        if path == "optimizer.param_rules":
            tree = [_named_rule(rule) for rule in tree]
        return [_rename_within(value, path) for value in tree]
    return VALUES.get(tree, tree) if isinstance(tree, str) else tree


def _named_rule(rule: Any) -> Any:
    if isinstance(rule, Mapping):
        return rule
    if not isinstance(rule, list | tuple) or len(rule) != len(RULE):
        raise UserError(f"optimizer.param_rules: {rule!r}: is no rule of {', '.join(RULE)}")
    return {key: value for key, value in zip(RULE, rule, strict=True) if value != RULE[key]}
