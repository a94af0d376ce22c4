"""A trained model as a serialised function (StableHLO) that runs without this package.

`function.bin` is a `jax.export` of one call, for any batch size, on CPU, GPU and TPU. A classifier takes
images [B, H, W, C] float32, normalised as the card's "preprocessing" says, and gives logits [B, K]. A
generator takes indices and labels, int32 [B] each, and gives images [B, H, W, C] float32 in [-1, 1], its
whole guided sampling loop inside (and the decoder of latents): image i depends on its index and label alone.
A frozen model takes its own arguments and gives what it gives.
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
from scaling.engine import autoencoder, features
from scaling.engine.runfolder import read_events
from scaling.errors import UserError
from scaling.files import read_json
from scaling.objectives.classification import Classification
from scaling.objectives.diffusion import Diffusion
from scaling.objectives.frozen import Frozen
from scaling.sampling import make_sampler

INSIDE = 2**30  # bytes; weights above this stand beside the function, as its first argument
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

    Weights of up to `inside` bytes are constants of the function. Raises: UserError for a run of another
    kind, or an `out` that exists.
    """
    trained = features.restore(folder)
    call, arguments = _call(trained)
    weights = jax.device_get({"params": trained.weights["params"], **trained.weights["collections"]})
    decoder = autoencoder.decoder(trained.built).params
    if decoder is not None:
        weights["decoder"] = jax.device_get(decoder)
    flat = {name: np.asarray(x) for name, x in flatten_dict(weights, sep="/").items()}
    beside = sum(x.nbytes for x in flat.values()) > inside
    if beside:
        given: tuple[Any, ...] = ({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()},)
        function = jax.jit(lambda weights, *x: call(unflatten_dict(weights, sep="/"), *x))
    else:
        given = ()
        function = jax.jit(lambda *x: call(unflatten_dict(flat, sep="/"), *x))
    exported = export.export(function, platforms=PLATFORMS)(*given, *arguments.values())
    card = json.dumps(_card(folder, trained, arguments, beside), indent=2) + "\n"
    written = {"function.bin": bytes(exported.serialize()), "model.json": card.encode()}
    files.write_folder(out, "weights", flat if beside else {}, written)


def _call(trained: features.Trained) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """`call(variables, *arguments)`, and the arguments by name with a symbolic batch size."""
    built, task = trained.built, trained.built.task
    (batch,) = export.symbolic_shape("batch")
    if isinstance(task, Classification):
        model = task.model
        image = jax.ShapeDtypeStruct((batch, *built.image_shape), jnp.float32)
        return lambda variables, x: jnp.asarray(model.apply(variables, x)), {"images": image}
    if isinstance(task, Diffusion):
        sampler = make_sampler(built.config.sampling, task, built.image_shape)
        count = jax.ShapeDtypeStruct((batch,), jnp.int32)
        arguments = {"indices": count, "labels": count}
        decode = autoencoder.decoder(built)
        return lambda w, i, y: decode(w.get("decoder"), sampler(w["params"], i, y)), arguments
    if isinstance(task, Frozen):
        own = {k: jax.ShapeDtypeStruct((batch, *v.shape[1:]), v.dtype) for k, v in built.batch(1).items()}
        return functools.partial(_forward, task.model, tuple(own)), own
    raise UserError(f"format='stablehlo': {built.config.objective.name} has no function to export")


def _forward(model: Any, names: tuple[str, ...], variables: Any, *arguments: jax.Array) -> Any:
    """What the model gives, a named tuple as a dict, which needs no class to be read."""
    out = model.apply(variables, **dict(zip(names, arguments, strict=True)))
    return out._asdict() if hasattr(out, "_asdict") else out


def _card(folder: Path, trained: features.Trained, arguments: dict[str, Any], beside: bool) -> dict[str, Any]:
    """What the function is: config, cost, metrics, data and commit, and how to call it."""
    described = read_json(folder / "config.json")
    metrics: dict[str, float] = {}
    for event in read_events(folder):
        if event["event"] == "evaluate" and event["step"] <= trained.step:
            metrics |= event["values"]
    return {
        "arguments": {name: f"{a.dtype} [{', '.join(map(str, a.shape))}]" for name, a in arguments.items()},
        "weights": "weights.safetensors" if beside else "inside the function",
        **_images(trained, arguments),
        "use": USE.format(beside=beside, names=", ".join(arguments)).splitlines(),
        "platforms": PLATFORMS,
        "step": trained.step,
        "metrics": metrics,
        **{key: described[key] for key in ("model", "cost", "data", "config", "version", "commit")},
    }


def _images(trained: features.Trained, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns what the card says of images: how inputs are made, or the range of those that come out."""
    built = trained.built
    if isinstance(built.task, Diffusion):
        return {"outputs": {"images": "float32 in about [-1, 1]; a pixel is clamp(127.5 x + 128, 0, 255)"}}
    name = next((name for name in ("images", "x") if name in arguments), None)
    if name is None or "t" in arguments:  # a text, or a noisy image
        return {}
    cfg = built.config
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
