"""From a checked config to the things a run is made of, before any array exists."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from scaling import data, flops, models, objectives
from scaling.engine import depth, sharding
from scaling.engine.config import Config, duration
from scaling.errors import UserError
from scaling.models import table
from scaling.objectives.base import Extras, Objective
from scaling.typed import typed


@dataclass(frozen=True, eq=False)  # equal only to itself: compiled functions are kept by it
class Built:
    """A run, ready to be initialised: what to train, on what, over which devices, for how long."""

    config: Config
    mesh: jax.sharding.Mesh
    info: data.Info
    task: Objective

    @property
    def model(self) -> Any:
        return self.task.model  # type: ignore[attr-defined]

    def steps_of(self, text: str, key: str) -> int:
        """A duration of this run in steps; percents are of the whole run."""
        batch, epoch = self.config.data.batch_size, self.info.train_examples
        return duration(text, key, batch, epoch, self.steps)

    def due(self, text: str, key: str) -> Callable[[int], bool]:
        """Whether a step is a multiple of the duration, or the last; "25 %" is four steps of any run."""
        if text.strip().endswith("%"):
            percent = float(text.strip().rstrip("% "))
            times = int(100 / percent) if percent else 0
            marks = {round(self.steps * percent / 100 * (i + 1)) for i in range(times)} | {self.steps}
            return lambda step: step in marks
        every = max(1, self.steps_of(text, key))
        return lambda step: step == self.steps or (step > 0 and step % every == 0)

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        config = self.config
        steps = duration(config.train.duration, "duration", config.data.batch_size, self.info.train_examples)
        if steps < 1:
            raise UserError(f"train.duration={config.train.duration!r}: is less than one step")
        return steps

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of `size` examples (`Info.columns`).

        Of a model that is not trained, the batch is its own arguments.
        """
        if not self.config.trains:
            model = self.config.model
            own = models.inputs(model.name, model.variant, **model.options)
            return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in own.items()}
        columns = self.info.columns.items()
        return {name: jax.ShapeDtypeStruct((size, *one), jnp.dtype(dtype)) for name, (one, dtype) in columns}

    def place(self) -> jax.sharding.NamedSharding:
        """Where training's batches lie; raises UserError where the mesh does not divide them."""
        return sharding.batch_sharding(self.mesh, self.config.data.batch_size, "data.batch_size")

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.info.image_shape


def build(config: Config, devices: list[jax.Device] | None = None, info: data.Info | None = None) -> Built:
    """Builds and checks everything that can be checked before compilation.

    `info` stands for the data where they need not be at hand: a trained run knows what it was trained on.

    Raises:
        UserError: for a model that does not fit its data, a mesh that is not of the devices, and the like.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    if info is None:
        info = data.info(config.data) if config.trains else made_for(config)
    try:
        config.preprocessing.require_channels(info.image_shape[-1])
    except UserError as e:
        raise UserError(f"preprocessing.{e}") from None
    try:
        name, model = config.objective.name, _model(config, info)
        task = objectives.make(name, model, config.preprocessing, **_options(config, info))
    except UserError as e:
        raise UserError(f"objective.{e}") from None
    built = Built(config, mesh, info, task)
    shapes = jax.eval_shape(lambda: init_variables(built, jax.random.key(0)))  # raises where they do not fit
    if config.optimizer.layer_decay != 1.0:
        depth.check(shapes["params"])
    built.steps_of(config.optimizer.warmup, "optimizer.warmup")
    return built


def data_of(built: Built, given: Mapping[str, Any], key: str) -> data.Data:
    """The run's own data, or what `given` names as a config's section does, cropped as the run's own are.

    Raises: UserError, naming `key`, for an option that is wrong, and images of another shape.
    """
    own = built.config.data
    if not given:
        return own
    crops = given.get("eval_transforms", own.eval_transforms)
    like = {"image_size": own.image_size, "eval_transforms": crops, "threads": own.threads}
    like["augment"] = crops  # only what is evaluated is read of it
    other: data.Data = typed(data.Data, {**like, **given}, key)
    shape = data.info(other).image_shape
    if shape != built.image_shape:
        raise UserError(f"{key}: images are {shape}, and the model sees {built.image_shape}")
    return other


def made_for(config: Config) -> data.Info:
    """The classes and the image shape that a variant is made for, where there are no data to tell."""
    family, variant, options = config.model.name, config.model.variant, config.model.options
    inputs, model = models.inputs(family, variant, **options), models.make(family, variant, **options)
    first = next(iter(inputs.values()))
    words = data.TextInfo(model.vocabulary, inputs["text"].shape[1], "") if "text" in inputs else None
    name = (config.data.builder or config.data.name) if config.trains else "none"
    classes = getattr(model, "num_classes", 0)
    return data.Info(name, classes, first.shape[1:], config.data.batch_size, text=words)


def _model(config: Config, info: data.Info) -> Any:
    """The model, with the data's classes, resolution and texts where the config leaves them open."""
    family, options = models.MODELS[config.model.name], dict(config.model.options)
    if not config.trains:  # what there is of it says what it is
        return models.make(config.model.name, config.model.variant, **options)
    known = {f.name for f in dataclasses.fields(family.MODULE)}
    height, width = info.image_shape[-3:-1]
    theirs: dict[str, Any] = {"resolution": height if height == width else (height, width)}
    if len(info.image_shape) == 4:
        theirs["frames"] = info.image_shape[0]
    own_check = "tasks" in known  # of a model that reads two images for one of its tasks
    if not own_check and ("frames" in known) != ("frames" in theirs):
        takes, there = ("videos", "images") if "frames" in known else ("images", "videos")
        raise UserError(f"model.family={config.model.name!r}: takes {takes}, and {info.name} holds {there}")
    if info.num_classes:
        theirs["num_classes"] = info.num_classes
    if info.text is not None:
        size, length = info.text.vocabulary, info.text.length
        theirs |= {"vocabulary": size, "context": length, "length": length}
        if options.get("vocabulary", size) != size:
            raise UserError(
                f"model.vocabulary={options['vocabulary']}: the tokenizer of data.text has {size} tokens; "
                "leave it out, or name the model's own tokenizer in data.text.vocabulary"
            )
    options |= {key: value for key, value in theirs.items() if key in known and key not in options}
    return models.make(config.model.name, config.model.variant, **options)


def _options(config: Config, info: data.Info) -> dict[str, Any]:
    """The objective's, with the data's [MASK] where the config leaves it open."""
    options = dict(config.objective.options)
    if info.text is not None and options.get("mask_token", 0) is None:
        options["mask_token"] = info.text.mask
    return options


def _zeros(batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}


def init_variables(built: Built, key: jax.Array) -> Any:
    """{"params": ..., other collections} of the task's model."""
    return built.task.init(key, _zeros(built.batch(1)))


def cost(built: Built) -> dict[str, float | None]:
    """What one example and one step cost, counted on the plain form (no remat, float32).

    `gmacs` is the forward pass of one example, counted from the objective's own loss, or from its `forward`
    where the loss takes several; `train_flops_per_step` is twice the multiply-adds of the gradient of the
    loss for one global batch.
    """
    plain = table.plain(built.model)
    if not built.config.trains:
        return {**table.cost(plain, built.batch(1)), "train_flops_per_step": None}
    task: Any = dataclasses.replace(built.task, model=plain)  # type: ignore[type-var]
    variables = jax.eval_shape(lambda: init_variables(built, jax.random.key(0)))
    params = variables["params"]
    extras = Extras(collections={k: v for k, v in variables.items() if k != "params"})

    def loss(params: Any, extras: Extras, batch: Any, train: bool) -> jax.Array:
        return task.loss(params, extras, batch, jax.random.key(0), train).value

    def once(params: Any, extras: Extras, batch: Any) -> Any:
        forward = getattr(task, "forward", None)
        return forward(params, extras, batch) if forward else loss(params, extras, batch, False)

    forward = flops.macs(lambda p, b: once(p, extras_zeros(extras), b), params, built.batch(1))
    gradient = jax.grad(lambda p, b: loss(p, extras_zeros(extras), b, True))
    step = flops.macs(gradient, params, built.batch(built.config.data.batch_size))
    return {
        "params": sum(int(x.size) for x in jax.tree.leaves(params)),
        "gmacs": forward / 1e9,
        "gflops": 2 * forward / 1e9,
        "tokens": plain.tokens(built.image_shape) if hasattr(plain, "tokens") else None,
        "train_flops_per_step": 2 * step,
    }


def extras_zeros(extras: Extras) -> Extras:
    """Concrete stand-ins, for tracing only."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), extras)
