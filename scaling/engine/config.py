"""Configs: `ml_collections` at the door, checked and frozen inside.

A config file has `get_config(variant) -> ConfigDict` with the sections of `Config`. What it leaves out
takes the defaults of the dataclasses that read it, so every key that exists can be overridden
(`--config.optimizer.learning_rate=3e-4`), and a key that nothing reads is an error.
"""

import ast
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from scaling.errors import UserError
from scaling.preprocessing import Preprocessing
from scaling.typed import checked, defaults_of, options_of, typed, typed_options, unknown

Rule = tuple[str, float, float | None, bool]  # (pattern, learning-rate multiple, weight decay, frozen)


@dataclass(frozen=True)
class Named:
    """A choice from a room's dict, with the options that its class reads."""

    name: str
    options: Mapping[str, Any]
    variant: str = ""


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1: whatever devices remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"{name}={size}: must be at least 1, or -1 for the devices that remain")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"data={self.data}: only one axis may be -1")

    def over(self, devices: int) -> dict[str, int] | None:
        """The size of each axis over so many devices; None where they do not multiply to them."""
        sizes = dataclasses.asdict(self)
        named = math.prod(size for size in sizes.values() if size != -1)
        found = {axis: devices // named if size == -1 else size for axis, size in sizes.items()}
        return found if math.prod(found.values()) == devices else None

    def elsewhere(self, devices: int) -> "Mesh":
        """Of a run that is read back on so many devices: this mesh where it fits, else one that cuts weights
        in as many of this one's parts as divide the devices.
        """
        if self.over(devices):
            return self
        parts = devices if -1 in (self.fsdp, self.tensor) else self.fsdp * self.tensor
        return Mesh(fsdp=math.gcd(parts, devices))


AXES = tuple(field.name for field in dataclasses.fields(Mesh))


@dataclass(frozen=True)
class Optimizer:
    """The update. `rules` are tried in order, first match wins; a weight decay of None is the global one."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup: str = "0 steps"
    drops: tuple[str, ...] = ()  # of the step schedule: when the rate falls to a tenth, such as "30 epochs"
    floor: float = 0.0  # of the cosine schedule: where it ends, as a share of learning_rate
    layer_decay: float = 1.0  # by which the rate falls with every layer from the head down
    weight_decay: float = 0.0
    decay: Literal["decoupled", "l2"] = "decoupled"  # l2 joins the gradient, before the momentum
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None  # of the gradient's global norm
    ema: tuple[float, ...] = ()  # decays; the first is what evaluation and sampling use
    rules: tuple[Rule, ...] = ((r"(bias|scale|positions|token|embedding)$", 1.0, 0.0, False),)

    def __post_init__(self) -> None:
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "greater than 0")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _require("b1", self.b1, 0 <= self.b1 < 1, "in [0, 1)")
        _require("b2", self.b2, 0 <= self.b2 < 1, "in [0, 1)")
        _require("eps", self.eps, self.eps > 0, "greater than 0")
        _require("clip", self.clip, self.clip is None or self.clip > 0, "greater than 0, or None")
        _require("ema", self.ema, all(0 <= d < 1 for d in self.ema), "decays in [0, 1)")
        _require("floor", self.floor, 0 <= self.floor <= 1, "in [0, 1]")
        _require("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "in (0, 1]")
        step, cosine = self.schedule == "step", self.schedule == "cosine"
        _require("drops", self.drops, bool(self.drops) == step, "durations with schedule='step', else none")
        _require("floor", self.floor, cosine or not self.floor, "0 but with schedule='cosine'")
        duration(self.warmup, "warmup", 1, 1, 1)
        for drop in self.drops:
            duration(drop, "drops", 1, 1, 1)
        for rule in self.rules:
            _pattern("rules", rule[0])


@dataclass(frozen=True)
class Train:
    duration: str = "1000 steps"
    seed: int = 0
    log_every: int = 50  # steps
    start: str | None = None  # a run's folder: its weights are those of step 0, as far as they fit
    start_only: str = ""  # a pattern: of the parameters' paths, those that are taken; "" is all

    def __post_init__(self) -> None:
        _require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2^31)")
        _require("log_every", self.log_every, self.log_every >= 1, "at least 1")
        _pattern("start_only", self.start_only)
        _require(
            "start_only", self.start_only, self.start is not None or not self.start_only, "'' without start"
        )
        if self.duration.endswith("%"):
            raise UserError(f"duration={self.duration!r}: must be in steps, examples or epochs")
        duration(self.duration, "duration", 1, 1)


@dataclass(frozen=True)
class Checkpoint:
    every: str = "25 %"
    keep: int = 2

    def __post_init__(self) -> None:
        _require("keep", self.keep, self.keep >= 1, "at least 1")
        duration(self.every, "every", 1, 1, 1)


@dataclass(frozen=True)
class Config:
    """A whole run, checked. `raw` is what `config.json` holds."""

    model: Named
    objective: Named
    data: Any  # scaling.data.Data
    optimizer: Optimizer
    mesh: Mesh
    train: Train
    evaluate: Mapping[str, Any]  # name -> an evaluator of engine.evaluate.EVALUATORS
    preprocessing: Preprocessing
    sampling: Any  # scaling.sampling.Sampling
    checkpoint: Checkpoint
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def trains(self) -> bool:
        """Whether there is a loss; without one there are no data either."""
        return hasattr(_objective_class(self.objective.name), "loss")


def _pattern(key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as e:
        raise UserError(f"{key}={text!r}: is not a regular expression ({e})") from None


def _require(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise UserError(f"{key}={value!r}: must be {allowed}")


def duration(
    text: str, key: str, batch_size: int, epoch_examples: int, total_steps: int | None = None
) -> int:
    """Steps in "800 steps", "51200 examples", "90 epochs" or (of a run of `total_steps`) "5 %"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(step|example|epoch|%)s?\s*", text)
    if not match:
        raise UserError(f"{key}={text!r}: must be like '800 steps', '51200 examples', '90 epochs' or '5 %'")
    unit = {
        "step": 1.0,
        "example": 1 / batch_size,
        "epoch": epoch_examples / batch_size,
        "%": (total_steps or 0) / 100,
    }
    return round(float(match[1]) * unit[match[2]])


# --- reading -------------------------------------------------------------------------------------


def load(source: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """The config of `FILE.py` or `FILE.py:ARGUMENT`, with overrides, checked whole.

    Args:
        source: the file, and what to hand to its `get_config`.
        overrides: `["optimizer.learning_rate=3e-4", ...]`, or a dict of dotted names.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    return from_dict(load_dict(source, overrides))


def load_dict(source: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """The same as plain nested dicts, every default filled in and every key checked."""
    config = complete(_read(source))
    known = {key for key, _ in _flatten(config)}
    for key, value in _pairs(overrides):
        if key not in known:
            raise UserError(unknown(key, known))
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
    from_dict(config)
    return config


def _read(source: str) -> dict[str, Any]:
    path, _, argument = source.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config={path}: no such file (a config is FILE.py or FILE.py:VARIANT)")
    spec = importlib.util.spec_from_file_location(f"scaling_config_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config={path}: has no get_config(variant) that returns a ConfigDict")
    made = module.get_config(argument) if argument else module.get_config()
    if not isinstance(made, ConfigDict):
        raise UserError(f"config={path}: get_config returned {type(made).__name__}, not a ConfigDict")
    return made.to_dict()


def _pairs(overrides: Iterable[str] | Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key}: needs a value, as in --config.{key}=VALUE")
        try:
            yield key, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            yield key, value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists become tuples, so that JSON and Python compare equal."""
    return {k: tupled(v) for k, v in _flatten(tree)}


def tupled(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(tupled(v) for v in value) if isinstance(value, list | tuple) else value


# --- filling in and checking ---------------------------------------------------------------------


def _sections() -> dict[str, type]:
    from scaling.data import Data
    from scaling.sampling import Sampling

    return {
        "data": Data,
        "preprocessing": Preprocessing,
        "optimizer": Optimizer,
        "mesh": Mesh,
        "train": Train,
        "sampling": Sampling,
        "checkpoint": Checkpoint,
    }


def _choice(table: Mapping[str, Any], section: str, key: str, value: object) -> Any:
    if value not in table:
        raise UserError(f"{section}.{key}={value!r}: must be one of {', '.join(sorted(table))}")
    return table[str(value)]


def _model_options(family: object) -> dict[str, Any]:
    from scaling.models import MODELS

    module = _choice(MODELS, "model", "family", family).MODULE
    return options_of(module, skip=("parent", "name"))  # flax's own


def _objective_class(name: object) -> type:
    from scaling.objectives import OBJECTIVES

    return _choice(OBJECTIVES, "objective", "name", name)


def _given() -> tuple[str, ...]:
    """The fields of an objective that are no options of its section."""
    from scaling.objectives import GIVEN

    return GIVEN


def _evaluator_class(name: str, kind: object) -> type:
    from scaling.engine.evaluate import EVALUATORS

    return _choice(EVALUATORS, f"evaluate.{name}", "kind", kind)


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every key that exists: what the file leaves out takes its default.

    A model's fields default to None, which means the variant's (or, for the number of classes and the
    resolution, the data's).
    """
    names = [f.name for f in dataclasses.fields(Config) if f.name != "raw"]
    for key in given:
        if key not in names:
            raise UserError(unknown(key, names))
    for key in ("model", "objective"):
        if not given.get(key):
            raise UserError(f"{key}: the config has no such section")
    config: dict[str, Any] = {name: _plain(given.get(name, {})) for name in names}
    model, objective = config["model"], config["objective"]
    config["model"] = {
        "family": None, "variant": None, **dict.fromkeys(_model_options(model.get("family"))), **model
    }  # fmt: skip
    task = _objective_class(objective.get("name"))
    if not config["data"] and hasattr(task, "loss"):
        raise UserError("data: the config has no such section")
    config["objective"] = {"name": None, **defaults_of(task, skip=_given()), **objective}
    for section, cls in _sections().items():
        config[section] = _merge(defaults_of(cls), config[section])
    for name, options in config["evaluate"].items():
        defaults = defaults_of(_evaluator_class(name, options.get("kind")))
        config["evaluate"][name] = _merge({"kind": None, **defaults}, options)
    return config


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if nested else value
    return base


def from_dict(config: Mapping[str, Any]) -> Config:
    """A complete config as frozen, typed sections; raises UserError at the first key that is wrong."""
    model = dict(config["model"])
    family, variant = model.pop("family"), model.pop("variant")
    options = {k: v for k, v in model.items() if v is not None}
    chosen = typed_options(_model_options(family), options, "model")
    made: dict[str, Any] = {"model": Named(family, chosen, checked(variant, str, "model.variant"))}

    objective = dict(config["objective"])
    task = _objective_class(objective.pop("name"))
    hints = options_of(task, skip=_given())
    made["objective"] = Named(config["objective"]["name"], typed_options(hints, objective, "objective"))

    for section, cls in _sections().items():
        made[section] = typed(cls, config[section], section)
    made["evaluate"] = {
        name: typed(
            _evaluator_class(name, options["kind"]),
            {k: v for k, v in options.items() if k != "kind"},
            f"evaluate.{name}",
        )
        for name, options in config["evaluate"].items()
    }
    return Config(**made, raw=config)
