"""Compiles what a run does for machines that are not here: `python -m scaling.engine.aot`.

A process of its own, as the compiler is chosen before jax is imported. It reads a request a line and answers
each with a line, both JSON; see `answer`.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from scaling import data, hardware, hlo
from scaling.engine import averages, build, config, gpus, sharding, state, tracing
from scaling.errors import UserError
from scaling.objectives.base import Extras
from scaling.sampling import make_sampler

# "Used 23.05G of 15.75G hbm", or "HLO temporaries (65.02G) exceeds available HBM (15.75G)"
FULL = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGTP])\)?(?: of| exceeds)")
GIB = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10, "P": 2.0**20}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What one chip needs and does, of `request` (`study.plan.Request`, as a dict).

    {"error": a line} for bad input; "fits" false, with what is needed, where the compiler runs out of memory.
    """
    try:
        cfg = config.load(request["config"], request["overrides"])
        if not cfg.trains:
            raise UserError(f"objective.name={cfg.objective.name!r}: has no loss, and so no step to plan")
        info, known = _info(cfg, request["examples"], request["side"])
        built = build.build(cfg, _devices(request["topology"]), info)
        batch = request["batch"] or cfg.data.batch_size
        program, arguments = PROGRAMS[request["what"]](built, batch)
        cost = {"cost": build.cost(built)} if request["what"] == "train" else {}
    except UserError as e:
        return {"error": str(e)}
    found: dict[str, Any] = {
        "batch": batch,
        "mesh": dict(built.mesh.shape),
        "coords": [[d.id] if d.platform == "gpu" else list(d.coords) for d in built.mesh.devices.flat],
        "uncut": sharding.uncut(state.abstract(built).params, built.mesh),
        "steps": built.steps if known else None,
        **cost,
    }
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        full = FULL.search(str(e))
        if full is None:
            return {"error": f"topology={request['topology']}: {str(e).strip().splitlines()[0][:300]}"}
        return found | {"fits": False, "needed_gib": float(full[1]) * GIB[full[2]]}
    memory = compiled.memory_analysis()
    parts = {k: getattr(memory, f"{k}_size_in_bytes") for k in ("argument", "output", "alias", "temp")}
    peak = parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]
    found |= {"fits": True, "needed_gib": (peak + memory.generated_code_size_in_bytes) / 2**30}
    chip, _ = hardware.slice_of(request["topology"])
    facts = hlo.read(compiled.as_text(), chip.flops, chip.hbm_bytes)
    return found | {"memory": parts, "facts": dataclasses.asdict(facts)}


def _devices(topology: str) -> list[Any]:
    """The chips of a topology, in no order that matters."""
    kind, _, sizes = topology.partition(":")
    # The two cores of a v4 chip are one device, as they are where it is rented.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if sizes == "1x1":  # a part of a host, which has four chips otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        if kind in hardware.GPUS:
            return gpus.devices(kind, int(sizes))
        there = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        return list(there.devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as e:
        raise UserError(f"topology={topology!r}: {str(e).strip().splitlines()[0][:200]}") from None


def _info(cfg: config.Config, examples: int | None, side: int | None) -> tuple[data.Info, bool]:
    """What the data are like: read where they are at hand, and otherwise what the model is made for.

    Then `side` is that of the model's input, and `examples` are an epoch's. And whether the steps of the run
    are known: not where its epochs are of data that are not here.

    Raises: UserError for either where the data are at hand.
    """
    try:
        info = data.info(cfg.data)
    except UserError:
        return _imagined(cfg, examples, side)
    for name, value in (("examples", examples), ("side", side)):
        if value is not None:
            there = f"{info.train_examples} examples of {'x'.join(map(str, info.image_shape))}"
            raise UserError(f"{name}={value}: the data are at hand, {there}; leave it out")
    return info, True


def _imagined(cfg: config.Config, examples: int | None, side: int | None) -> tuple[data.Info, bool]:
    info = build.made_for(cfg)
    text = info.text and dataclasses.replace(info.text, mask=0)
    *frames, height, width, channels = info.image_shape
    shape = (*frames, side or height, side or width, channels)
    epoch = examples or info.train_examples  # an epoch is a step, for want of better
    info = dataclasses.replace(info, text=text, image_shape=shape, train_examples=epoch)
    return info, examples is not None or "epoch" not in cfg.train.duration


# What is compiled: a jitted function, and its arguments as shapes with their places.


def _placed(built: build.Built, tree: Any) -> Any:
    whole = NamedSharding(built.mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), tree)


def _batch(built: build.Built, size: int, key: str) -> dict[str, Any]:
    place = sharding.batch_sharding(built.mesh, size, key)
    return {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for k, s in built.batch(size).items()}


def _train(built: build.Built, size: int) -> tuple[Any, tuple[Any, ...]]:
    scalars = _placed(built, jax.eval_shape(lambda: state.numbers(built)))
    return state.make_step(built), (state.abstract(built), _batch(built, size, "data.batch_size"), scalars)


def _evaluate(built: build.Built, size: int) -> tuple[Any, tuple[Any, ...]]:
    like, batch = state.abstract(built), _batch(built, size, "batch_size")
    mask = jax.ShapeDtypeStruct((size,), np.float32, sharding=batch["image"].sharding)
    index = _placed(built, jax.ShapeDtypeStruct((), np.int32))
    return averages.step(built), (like.params, Extras(like.collections), batch | {"mask": mask}, index)


def _sample(built: build.Built, size: int) -> tuple[Any, tuple[Any, ...]]:
    if not hasattr(built.task, "predict"):
        raise UserError(f"what='sample': objective {built.config.objective.name} generates nothing")
    place = sharding.batch_sharding(built.mesh, size, "batch_size")
    rows = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=place)
    sampler = make_sampler(built.config.sampling, built.task, built.image_shape)  # type: ignore[arg-type]
    return jax.jit(tracing.on(built.mesh, sampler)), (state.abstract(built).params, rows, rows)


PROGRAMS = {"train": _train, "evaluate": _evaluate, "sample": _sample}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
