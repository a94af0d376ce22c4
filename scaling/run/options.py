"""The sections of a run's config as frozen dataclasses, each of which checks itself."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scaling.data import Data
from scaling.errors import UserError
from scaling.models.roles import Kind
from scaling.parallel.mesh import Mesh
from scaling.preprocessing import Preprocessing
from scaling.sampling import Sampling
from scaling.validation import LARGEST_FLOAT, LARGEST_INT, shown

OptimizerName = Literal["adamw", "sgd", "muon"]


def _pattern(key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as e:
        raise UserError(f"{key}={text!r}: is not a regular expression ({e})") from None


def _require(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise UserError(f"{key}={value!r}: must be {allowed}")


@dataclass(frozen=True)
class Named:
    """A choice by name (of a model, an objective, an evaluator), with the options that its class reads."""

    name: str
    options: Mapping[str, Any]
    variant: str = ""  # variant of the model, such as "B/16"; "" for other choices


@dataclass(frozen=True)
class ParamRule:
    """The update of some parameters, those that `match` and `role` select together, where it is another."""

    match: str = ""  # regular expression that is searched in a parameter's path; "" for every path
    role: Kind | None = None  # role of the parameters; None for every role
    lr_scale: float = 1.0  # factor of the learning rate
    weight_decay: float | None = None  # None for the global one
    frozen: bool = False  # whether the parameters stay as they are
    optimizer: OptimizerName | None = None  # None for the global one; "muon" is for matrices

    def __post_init__(self) -> None:
        _pattern("match", self.match)
        selects = bool(self.match) or self.role is not None
        _require("match", self.match, selects, "a regular expression, or '' with a role")
        _require("lr_scale", self.lr_scale, self.lr_scale >= 0, "at least 0")
        _require("weight_decay", self.weight_decay, (self.weight_decay or 0) >= 0, "at least 0, or None")


@dataclass(frozen=True)
class Optimizer:
    """The update of the parameters; `param_rules` are tried in order, and the first match wins."""

    name: OptimizerName = "adamw"
    learning_rate: float = 1e-4  # peak rate
    schedule: Literal["constant", "cosine", "step", "wsd"] = "constant"
    warmup: str = "0 steps"  # duration of the linear rise from 0 to the peak rate
    lr_milestones: tuple[str, ...] = ()  # durations after which the "step" schedule divides the rate by 10
    cooldown: str | None = None  # duration of the decay that ends the "wsd" schedule
    final_lr_ratio: float = 0.0  # final rate of "cosine" and "wsd", as a share of learning_rate
    mup_base: str = ""  # base of the maximal update parametrisation, as "width=32,heads=4"
    layer_decay: float = 1.0  # factor of the rate per layer from the head down
    weight_decay: float = 0.0  # global coefficient, multiplied by the learning rate
    weight_decay_mode: Literal["decoupled", "l2"] = "decoupled"  # "l2": gradient term, before momentum
    b1: float = 0.9  # decay of AdamW's first moment, or SGD's momentum
    b2: float = 0.999  # decay of AdamW's second moment
    eps: float = 1e-8  # term in AdamW's denominator
    grad_clip_norm: float | None = None  # maximum global norm of the gradient
    ema_decays: tuple[float, ...] = ()  # decays per step of the averages; the first one is evaluated
    param_rules: tuple[ParamRule, ...] = (
        ParamRule(r"(bias|scale|positions|token|embedding)$", weight_decay=0.0),
    )

    def __post_init__(self) -> None:
        by_rule = "adamw or sgd; muon is for matrices, by a rule: ParamRule(role='matrix', optimizer='muon')"
        _require("name", self.name, self.name != "muon", by_rule)
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "greater than 0")
        _require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _require("b1", self.b1, 0 <= self.b1 < 1, "in [0, 1)")
        _require("b2", self.b2, 0 <= self.b2 < 1, "in [0, 1)")
        _require("eps", self.eps, self.eps > 0, "greater than 0")
        _require(
            "grad_clip_norm",
            self.grad_clip_norm,
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            "greater than 0, or None",
        )
        _require("ema_decays", self.ema_decays, all(0 <= d < 1 for d in self.ema_decays), "decays in [0, 1)")
        _require("final_lr_ratio", self.final_lr_ratio, 0 <= self.final_lr_ratio <= 1, "in [0, 1]")
        _require("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "in (0, 1]")
        _require(
            "lr_milestones",
            self.lr_milestones,
            bool(self.lr_milestones) == (self.schedule == "step"),
            "durations with schedule='step', else none",
        )
        _require(
            "final_lr_ratio",
            self.final_lr_ratio,
            not self.final_lr_ratio or self.schedule in ("cosine", "wsd"),
            "0 but with schedule='cosine' or 'wsd'",
        )
        _require(
            "cooldown",
            self.cooldown,
            (self.cooldown is not None) == (self.schedule == "wsd"),
            "a duration with schedule='wsd', else None",
        )
        if self.cooldown is not None:
            parse_duration(self.cooldown, "cooldown")
        if parse_mup_base(self.mup_base):
            muon = any(rule.optimizer for rule in self.param_rules)
            _require("name", self.name, self.name == "adamw" and not muon, "adamw for all, with mup_base")
        parse_duration(self.warmup, "warmup")
        for milestone in self.lr_milestones:
            parse_duration(milestone, "lr_milestones")


@dataclass(frozen=True)
class Train:
    """The length of training, its seed, and the weights that it starts from."""

    duration: str = "1000 steps"  # length of the run in steps, examples or epochs
    seed: int = 0  # seed of initialisation, data order, augmentation and noise
    log_every: int = 50  # steps between two lines of metrics
    init_from: str | None = None  # folder of the run whose weights, where they fit, are those of step 0
    continue_from: str | None = None  # folder of the run, or its checkpoint, whose whole state to go on from
    init_only: str = ""  # pattern of the paths of the parameters to take from init_from; "" for all

    def __post_init__(self) -> None:
        _require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2^31)")
        _require("log_every", self.log_every, self.log_every >= 1, "at least 1")
        _pattern("init_only", self.init_only)
        _require(
            "init_only",
            self.init_only,
            self.init_from is not None or not self.init_only,
            "'' without init_from",
        )
        _require(
            "continue_from",
            self.continue_from,
            None in (self.continue_from, self.init_from),
            "None with init_from",
        )
        if parse_duration(self.duration, "duration")[1] == "%":
            raise UserError(f"duration={self.duration!r}: must be in steps, examples or epochs")
        for key in ("init_from", "continue_from"):
            _require(key, getattr(self, key), getattr(self, key) != "", "the folder of a run, or None")


@dataclass(frozen=True)
class Checkpoint:
    """How often the state is saved."""

    every: str = "25 %"  # duration between two checkpoints
    keep: int = 2  # number of newest checkpoints that stay on disk
    keep_at: tuple[str, ...] = ()  # durations after which one is saved that stays for ever

    def __post_init__(self) -> None:
        for duration in self.keep_at:
            parse_duration(duration, "keep_at")
        _require("keep", self.keep, self.keep >= 1, "at least 1")
        check_period(self.every, "every")


@dataclass(frozen=True)
class Config:
    """The checked config of a run; `raw` is the nested dict that `config.json` holds."""

    model: Named
    objective: Named
    data: Data
    optimizer: Optimizer
    mesh: Mesh
    train: Train
    evaluators: Mapping[str, Named]  # evaluators by the names of their metrics
    helpers: Mapping[str, str]  # folders of the runs whose frozen models this one uses, by their names
    preprocessing: Preprocessing
    sampling: Sampling
    checkpoint: Checkpoint
    raw: Mapping[str, Any] = field(repr=False)


SMALLEST_PERCENT = 0.01  # of a run: what is done more often is meant in steps


def parse_duration(text: str, key: str) -> tuple[float, str]:
    """Returns the number and the unit of "800 steps", "51200 examples", "90 epochs" or "5 %".

    Raises:
        UserError: if the text, the value of `key`, is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(step|example|epoch|%)s?\s*", text)
    if not match:
        raise UserError(
            f"{key}={shown(text)}: must be like '800 steps', '51200 examples', '90 epochs' or '5 %'"
        )
    number = float(match[1])
    if number > LARGEST_FLOAT:
        raise UserError(f"{key}={shown(text)}: is more than any run has; give a finite number")
    return number, match[2]


def check_period(text: str, key: str) -> None:
    """Checks the duration between two saves or evaluations.

    Raises:
        UserError: if it is no duration, is nothing, or has more or fewer percents than there can be.
    """
    number, unit = parse_duration(text, key)
    if unit == "%" and not SMALLEST_PERCENT <= number <= 100:
        raise UserError(f"{key}={text!r}: must be from {SMALLEST_PERCENT:g} % to 100 % of the run")
    if number == 0:
        raise UserError(f"{key}={text!r}: must be more than nothing; '100 %' is once, at the end")


def duration(
    text: str, key: str, batch_size: int, epoch_examples: int, total_steps: int | None = None
) -> int:
    """Converts "800 steps", "51200 examples", "90 epochs" or "5 %" (of a run of `total_steps`) to steps.

    Raises:
        UserError: if the text, the value of `key`, is none of these, or more steps than can be counted.
    """
    number, name = parse_duration(text, key)
    unit = {
        "step": 1.0,
        "example": 1 / batch_size,
        "epoch": epoch_examples / batch_size,
        "%": (total_steps or 0) / 100,
    }
    steps = number * unit[name]
    if steps > LARGEST_INT:
        raise UserError(f"{key}={text!r}: is {steps:.3g} steps; must be fewer than 2^31")
    return round(steps)


def parse_mup_base(text: str) -> dict[str, Any]:
    """Returns "width=32,heads=4x8" as {"width": 32, "heads": (4, 8)}.

    Raises:
        UserError: if it is of another form.
    """
    parts = [part.partition("=") for part in text.split(",")] if text else []
    form = r"[1-9]\d*(x[1-9]\d*)*"
    if not all(re.fullmatch(r"[a-z_]+", key) and re.fullmatch(form, value) for key, _, value in parts):
        raise UserError(f"mup_base={text!r}: must be options of the model, as 'width=32,heads=4'")
    values = {key: tuple(int(number) for number in value.split("x")) for key, _, value in parts}
    return {key: value[0] if len(value) == 1 else value for key, value in values.items()}
