"""A trained model as a serialised function (StableHLO) that runs without this package.

`function.bin` is a `jax.export` of one call, for any batch size, on CPU, GPU and TPU. A classifier takes
images [B, H, W, C] float32, normalised as the card's "preprocessing" says, and returns logits [B, K]. A
generator takes indices and labels, int32 [B] each, and returns images [B, H, W, C] float32 in [-1, 1]; where
it is conditioned on something else, this takes the labels' place. Its function contains the whole guided
sampling loop (and the decoder of latents), and image i depends on its index and condition alone. A frozen
model keeps its own arguments and outputs.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from scaling.convert import files
from scaling.errors import UserError
from scaling.evaluators import autoencoder
from scaling.evaluators.generate import sampler_of
from scaling.models.conditioning import Condition
from scaling.objectives.base import Helper
from scaling.objectives.classification import Classification
from scaling.objectives.diffusion import Diffusion
from scaling.objectives.frozen import Frozen
from scaling.run import restore
from scaling.run.build import AUTOENCODER, helper_shapes
from scaling.run.folder import read_description, read_evaluations
from scaling.run.helpers import RunHelpers

INSIDE = 2**30  # maximum bytes of weights inside the function; larger ones are its first argument, in a file
PLATFORMS = ("cpu", "cuda", "tpu")

USE = """\
import jax, jax.export
from safetensors.numpy import load_file  # only where the weights stand beside the function
function = jax.export.deserialize(bytearray(open("function.bin", "rb").read()))
weights = [load_file("weights.safetensors")] if {beside} else []
outputs = function.call(*weights, {names})
"""


def export_function(folder: Path, out: Path, inside: int = INSIDE) -> None:
    """Writes the run `folder` as `out`: function.bin, model.json (the card) and, where large, its weights.

    Weights of up to `inside` bytes are constants of the function.

    Raises:
        UserError: if the run is of another kind, or `out` exists.
    """
    trained = restore.restore_run(folder)
    call, arguments = _call(trained)
    weights = jax.device_get({"params": trained.weights["params"], **trained.weights["collections"]})
    helpers = RunHelpers(trained.run, folder)
    if trained.run.info.latents is not None:
        weights["decoder"] = jax.device_get(helpers.load(AUTOENCODER).variables)
    flat = {name: np.asarray(x) for name, x in flatten_dict(weights, sep="/").items()}
    beside = sum(x.nbytes for x in flat.values()) > inside
    if beside:
        weights_argument: tuple[Any, ...] = (
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()},
        )
        function = jax.jit(lambda weights, *x: call(unflatten_dict(weights, sep="/"), *x))
    else:
        weights_argument = ()
        function = jax.jit(lambda *x: call(unflatten_dict(flat, sep="/"), *x))
    exported = export.export(function, platforms=PLATFORMS)(*weights_argument, *arguments.values())
    card = json.dumps(_card(folder, trained, arguments, beside), indent=2) + "\n"
    written = {"function.bin": bytes(exported.serialize()), "model.json": card.encode()}
    files.write_folder(out, "weights", flat if beside else {}, written)


def _call(trained: restore.RestoredRun) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """Returns `call(variables, *arguments)`, and the arguments by name with a symbolic batch size."""
    run, objective = trained.run, trained.run.objective
    (batch,) = export.symbolic_shape("batch")
    if isinstance(objective, Classification):
        model = objective.model
        image = jax.ShapeDtypeStruct((batch, *run.image_shape), jnp.float32)
        return lambda variables, x: jnp.asarray(model.apply(variables, x)), {"images": image}
    if isinstance(objective, Diffusion):
        sampler = sampler_of(run.config.sampling, objective, run)
        columns = {k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for k, v in run.batch(1).items()}
        condition = jax.eval_shape(objective.conditioning.of, columns, run.helper_shapes)
        name = "condition" if isinstance(condition, dict) else "labels"
        arguments = {"indices": jax.ShapeDtypeStruct((batch,), jnp.int32), name: condition}
        module = None if run.info.latents is None else helper_shapes(run, AUTOENCODER).module
        tile = run.config.sampling.decode_tile

        def generate(weights: Any, indices: jax.Array, condition: Condition) -> jax.Array:
            samples = sampler(weights["params"], indices, condition)
            helpers = {} if module is None else {AUTOENCODER: Helper(weights["decoder"], module)}
            return autoencoder.decode(run, helpers, samples, tile)

        return generate, arguments
    if isinstance(objective, Frozen):
        inputs = {k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for k, v in run.batch(1).items()}
        return functools.partial(_forward, objective.model, tuple(inputs)), inputs
    raise UserError(f"format='stablehlo': {run.config.objective.name} has no function to export")


def _forward(model: Any, names: tuple[str, ...], variables: Any, *arguments: jax.Array) -> Any:
    """Returns the model's outputs, a named tuple as a dict, which can be read without its class."""
    out = model.apply(variables, **dict(zip(names, arguments, strict=True)))
    return out._asdict() if hasattr(out, "_asdict") else out


def _card(
    folder: Path, trained: restore.RestoredRun, arguments: dict[str, Any], beside: bool
) -> dict[str, Any]:
    """Returns the description of the function: config, cost, metrics, data, commit, and how to call it."""
    described = read_description(folder) or {}
    metrics: dict[str, float] = {}
    for step, values in read_evaluations(folder).items():
        if step <= trained.step:
            metrics |= values
    return {
        "arguments": jax.tree.map(lambda a: f"{a.dtype} [{', '.join(map(str, a.shape))}]", arguments),
        "weights": "weights.safetensors" if beside else "inside the function",
        **_images(trained, arguments),
        "use": USE.format(beside=beside, names=", ".join(arguments)).splitlines(),
        "platforms": PLATFORMS,
        "step": trained.step,
        "metrics": metrics,
        **{key: described.get(key) for key in ("model", "cost", "data", "config", "version", "commit")},
    }


def _images(trained: restore.RestoredRun, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the card's entry on images: how inputs are preprocessed, or the range of generated ones."""
    run = trained.run
    if isinstance(run.objective, Diffusion):
        return {"outputs": {"images": "float32 in about [-1, 1]; a pixel is clamp(127.5 x + 128, 0, 255)"}}
    name = next((name for name in ("images", "x") if name in arguments), None)
    if name is None or "t" in arguments:  # a text, or a noisy image
        return {}
    cfg = run.config
    crops = "resized and cropped by `transforms` to `size`" if cfg.data.eval_transforms else "of `size`"
    return {
        "preprocessing": {
            "argument": name,
            "pixels": f"RGB (or grey) in 0..255, {crops}",
            "normalisation": "(pixel / 255 - mean) / std",
            "mean": cfg.preprocessing.mean,
            "std": cfg.preprocessing.std,
            "range": cfg.preprocessing.range(),
            "size": arguments[name].shape[-3:-1],
            "transforms": cfg.data.eval_transforms,
        }
    }
