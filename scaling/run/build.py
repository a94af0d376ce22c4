"""Builds a run from a checked config: everything it is made of, before any array exists."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.core import unfreeze

from scaling import data, models, objectives
from scaling.data.sources.latents import in_current_keys
from scaling.errors import UserError
from scaling.objectives.base import Helper, Objective
from scaling.objectives.diffusion import Diffusion
from scaling.overrides import flat
from scaling.parallel import sharding
from scaling.run import config as run_config
from scaling.run import layer_decay
from scaling.run.folder import read_description
from scaling.run.options import Config, check_period, duration, parse_duration
from scaling.validation import in_section, parse_dataclass

R = TypeVar("R")

# Keys whose values are arguments of compiled functions (`state.hparam_values`), never part of their code,
# and the values that they have in the run that those functions are made of.
TRACED: dict[str, Any] = {
    "train.seed": 0,
    "optimizer.learning_rate": 1.0,
    "optimizer.weight_decay": 0.0,
    "objective.condition_dropout": 1.0,
}
KEPT = 16  # number of runs, with other code each, whose compiled functions a process keeps


@dataclass(frozen=True, eq=False)  # equal only to itself
class Run:
    """A run, ready to be initialised: what to train, on which data and devices, and for how long."""

    config: Config
    mesh: jax.sharding.Mesh
    info: data.Info
    objective: Objective
    _functions: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)  # `shared_by_runs`

    @property
    def model(self) -> Any:
        return self.objective.model  # type: ignore[attr-defined]

    def steps_of(self, text: str, key: str) -> int:
        """Returns a duration of this run in steps; percents are of the whole run."""
        batch, epoch = self.config.data.batch_size, self.info.train_examples
        return duration(text, key, batch, epoch, self.steps)

    def kept_steps(self) -> list[int]:
        """Returns the steps whose checkpoints stay for ever.

        Raises:
            UserError: if one is not of the run.
        """
        steps = [self.steps_of(text, "checkpoint.keep_at") for text in self.config.checkpoint.keep_at]
        for text, step in zip(self.config.checkpoint.keep_at, steps, strict=True):
            if not 1 <= step <= self.steps:
                raise UserError(
                    f"checkpoint.keep_at={text!r}: is step {step}, and the run has {self.steps}; "
                    "name one of them"
                )
        return steps

    def due(self, text: str, key: str) -> Callable[[int], bool]:
        """Returns a function that tells whether something is due at a step.

        It is due at multiples of the duration and at the last step; "25 %" is four steps of any run.

        Raises:
            UserError: for what is no such duration, or less than one step.
        """
        check_period(text, key)
        percent, unit = parse_duration(text, key)
        if unit == "%":
            times = int(100 / percent)
            marks = {round(self.steps * percent / 100 * (i + 1)) for i in range(times)} | {self.steps}
            return lambda step: step in marks
        every = self.steps_of(text, key)
        if unit == "epoch":
            every = max(1, every)  # of few examples, a step may be more than an epoch
        if every < 1:
            raise UserError(f"{key}={text!r}: is less than one step; give one step or more")
        return lambda step: step == self.steps or (step > 0 and step % every == 0)

    @cached_property
    def steps(self) -> int:
        """Number of steps of the whole run.

        Raises:
            UserError: if the duration is less than one step.
        """
        text, batch = self.config.train.duration, self.config.data.batch_size
        steps = duration(text, "train.duration", batch, self.info.train_examples)
        if steps < 1:
            raise UserError(f"train.duration={text!r}: is less than one step")
        return steps

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of `size` examples (`Info.columns`).

        For a model that is not trained, the batch is the model's own arguments.
        """
        if not objectives.trains(self.config.objective.name):
            model = self.config.model
            arguments = models.inputs(model.name, model.variant, **model.options)
            return {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for k, x in arguments.items()}
        columns = self.info.columns.items()
        return {k: jax.ShapeDtypeStruct((size, *shape), jnp.dtype(dtype)) for k, (shape, dtype) in columns}

    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Returns the sharding of training's batches.

        Raises:
            UserError: if the mesh does not divide the batch.
        """
        return sharding.batch_sharding(self.mesh, self.config.data.batch_size, "data.batch_size")

    @cached_property
    def shared(self) -> "Run":
        """The run whose compiled functions this one uses: one for all that differ in `TRACED` keys alone."""
        known = flat(self.config.raw)
        config = run_config.changed(self.config, {k: v for k, v in TRACED.items() if k in known})
        objective: Any = self.objective
        if isinstance(objective, Diffusion):
            rate = TRACED["objective.condition_dropout"]
            objective = dataclasses.replace(objective, condition_dropout=rate)
        key = (json.dumps(config.raw, sort_keys=True), self.mesh, repr(self.info), objective)
        run = _SHARED.pop(key, None) or Run(config, self.mesh, self.info, objective)
        vars(run)["shared"] = run
        _SHARED[key] = run  # the newest is the last
        if len(_SHARED) > KEPT:
            del _SHARED[next(iter(_SHARED))]
        return run

    @property
    def variable_shapes(self) -> dict[str, Any]:
        """The shapes of {"params": ..., other collections}."""
        return _variable_shapes(self)

    @cached_property
    def helper_shapes(self) -> dict[str, Helper]:
        """The helpers that the config names, with shapes in place of weights."""
        return {name: helper_shapes(self, name) for name in self.config.helpers}

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.info.image_shape


_SHARED: dict[Hashable, Run] = {}


def shared_by_runs(make: Callable[..., R]) -> Callable[..., R]:
    """Returns `make(run, ...)`, called once for all runs that differ in `TRACED` keys alone.

    It is called with `run.shared`, so that nothing it returns can depend on the values of those keys.
    """

    @wraps(make)
    def made(run: Run, *options: Hashable) -> R:
        functions = run.shared._functions
        if (make, options) not in functions:
            functions[make, options] = make(run.shared, *options)
        result: R = functions[make, options]
        return result

    return made


@shared_by_runs
def _variable_shapes(run: Run) -> dict[str, Any]:
    """Returns the shapes of the variables, for which the model is traced once."""
    shapes: dict[str, Any] = unfreeze(jax.eval_shape(lambda: init_variables(run, jax.random.key(0))))
    return shapes


def _check_cooldown(run: Run) -> None:
    options = run.config.optimizer
    if options.cooldown is None:
        return
    steps = run.steps_of(options.cooldown, "optimizer.cooldown")
    others = run.steps - run.steps_of(options.warmup, "optimizer.warmup")
    if not 1 <= steps <= others:
        raise UserError(
            f"optimizer.cooldown={options.cooldown!r}: is {steps} steps, and {others} follow the warm-up; "
            "make it shorter"
        )


def build(
    config: Config,
    devices: list[jax.Device] | None = None,
    info: data.Info | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Run:
    """Builds a run, and checks everything that can be checked before compilation.

    `info` describes the data where they need not be at hand: a trained run knows what it was trained on.
    `mesh` takes the place of the config's over all `devices`.

    Raises:
        UserError: for a model that does not fit its data, a mesh that does not fit the devices, and the like.
    """
    mesh = mesh or sharding.make_mesh(config.mesh, devices)
    if info is None:
        info = data.info(config.data) if objectives.trains(config.objective.name) else made_for(config)
    try:
        config.preprocessing.require_channels(info.image_shape[-1])
    except UserError as e:
        raise UserError(f"preprocessing.{e}") from None
    model, options = _model(config, info), _objective_options(config, info)
    try:
        objective = objectives.make(config.objective.name, model, config.preprocessing, **options)
    except UserError as e:
        raise in_section("objective", e, config.objective.options) from None
    run = Run(config, mesh, info, objective)
    try:
        shapes = run.variable_shapes  # raises if model and data do not fit
    except UserError as e:
        raise in_section("model", e, (f.name for f in dataclasses.fields(run.model))) from None
    if config.optimizer.layer_decay != 1.0:
        layer_decay.multiples(shapes["params"], config.optimizer.layer_decay)
    run.steps_of(config.optimizer.warmup, "optimizer.warmup")
    for milestone in config.optimizer.lr_milestones:
        run.steps_of(milestone, "optimizer.lr_milestones")
    _check_cooldown(run)
    run.due(config.checkpoint.every, "checkpoint.every")
    run.kept_steps()
    return run


def made_for(config: Config) -> data.Info:
    """Returns the classes and the image shape that a variant is made for, where no data give them."""
    family, variant, options = config.model.name, config.model.variant, config.model.options
    inputs, model = models.inputs(family, variant, **options), models.make(family, variant, **options)
    first = next(iter(inputs.values()))
    text = data.TextInfo(model.vocabulary, inputs["text"].shape[1], "") if "text" in inputs else None
    name = (config.data.builder or config.data.name) if objectives.trains(config.objective.name) else "none"
    classes = getattr(model, "num_classes", 0)
    return data.Info(name, classes, first.shape[1:], config.data.batch_size, text=text)


def _model(config: Config, info: data.Info) -> Any:
    """Makes the model, with the data's classes, resolution and texts where the config leaves them open."""
    family, options = models.MODELS[config.model.name], dict(config.model.options)
    if not objectives.trains(config.objective.name):  # there are no data to fill its options from
        return models.make(config.model.name, config.model.variant, **options)
    if len(info.image_shape) not in (3, 4):
        raise UserError(f"data.image_shape={info.image_shape}: must be [H, W, C] or [T, H, W, C]")
    fields = {f.name for f in dataclasses.fields(family.module)}
    height, width = info.image_shape[-3:-1]
    from_data: dict[str, Any] = {"resolution": height if height == width else (height, width)}
    if len(info.image_shape) == 4:
        from_data["frames"] = info.image_shape[0]
    checks_itself = "tasks" in fields  # a model with tasks reads two images for one of them
    if not checks_itself and ("frames" in fields) != ("frames" in from_data):
        takes, holds = ("videos", "images") if "frames" in fields else ("images", "videos")
        raise UserError(f"model.name={config.model.name!r}: takes {takes}, and {info.name} holds {holds}")
    if info.num_classes:
        if "num_classes" in fields and options.get("num_classes", info.num_classes) < info.num_classes:
            raise UserError(
                f"model.num_classes={options['num_classes']}: {info.name} has labels of {info.num_classes} "
                "classes; leave it out, or give at least as many"
            )
        from_data["num_classes"] = info.num_classes
    if info.text is not None:
        size, length = info.text.vocabulary, info.text.length
        from_data |= {"vocabulary": size, "context": length, "length": length}
        if options.get("vocabulary", size) != size:
            raise UserError(
                f"model.vocabulary={options['vocabulary']}: the tokenizer of data.text has {size} tokens; "
                "leave it out, or name the model's own tokenizer in data.text.vocab_file"
            )
    options |= {key: value for key, value in from_data.items() if key in fields and key not in options}
    return models.make(config.model.name, config.model.variant, **options)


def _objective_options(config: Config, info: data.Info) -> dict[str, Any]:
    """Returns the objective's options, with the data's [MASK] where the config leaves it open."""
    options = dict(config.objective.options)
    if info.text is not None and options.get("mask_token", 0) is None:
        options["mask_token"] = info.text.mask
    return options


def _zeros(batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}


def init_variables(run: Run, key: jax.Array) -> Any:
    """Returns {"params": ..., other collections} of the objective's model."""
    return run.objective.init(key, _zeros(run.batch(1)), run.helper_shapes)


# --- other runs ---

AUTOENCODER = "autoencoder"  # name of the helper that encoded a run's latents


def described_run(folder: Path | str, mesh: jax.sharding.Mesh | None = None) -> Run:
    """Builds the run of a folder from its config.json, over `mesh` or whatever devices there are.

    Raises:
        UserError: if the folder holds no run.
    """
    description = read_description(folder)
    if description is None:
        raise UserError(
            f"run={folder}: no config.json there; give the folder of a run made by `scaling train`"
        )
    try:
        cfg = run_config.from_dict(run_config.stored(description))
        info = _stored_info(description)
    except UserError as e:
        raise UserError(f"{Path(folder) / 'config.json'}: {e}") from None
    cfg = dataclasses.replace(cfg, mesh=cfg.mesh.elsewhere(jax.device_count()))
    return build(cfg, info=info, mesh=mesh)


def _stored_info(description: Mapping[str, Any]) -> data.Info | None:
    """Returns the description of the data in a run's config.json; None where an older file has none."""
    section = description.get("data")
    if section and isinstance(section.get("latents"), Mapping):
        section = {**section, "latents": in_current_keys(section["latents"])}
    return section and parse_dataclass(data.Info, section, "data")


def helper_place(run: Run, name: str) -> tuple[str, str]:
    """Returns the folder of a helper, and the key that names it, for errors."""
    if name in run.config.helpers:
        folder = run.config.helpers[name]
        return folder, f"helpers.{name}={folder!r}"
    assert name == AUTOENCODER and run.info.latents is not None
    return run.info.latents.run, f"data.data_dir={run.config.data.data_dir!r}: its autoencoder"


def helper_shapes(run: Run, name: str) -> Helper:
    """Returns a helper with shapes in place of weights, for which no checkpoint is read.

    Raises:
        UserError: if its run is missing.
    """
    folder, key = helper_place(run, name)
    try:
        described = described_run(folder, run.mesh)
    except UserError as e:
        raise UserError(f"{key}: {e}") from None
    shapes = described.variable_shapes
    shardings = {name: sharding.replicated(tree, run.mesh) for name, tree in shapes.items()}
    shardings["params"] = sharding.param_shardings(shapes["params"], run.mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Helper(placed, described.model)
