"""The process that compiles a run for machines that are not here: `python -m scaling.plan.compile`.

It is a process of its own because the compiler is chosen before jax is imported. It reads one request per
line and answers each with one line, both JSON; see `answer`.
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

from scaling import data, objectives
from scaling.errors import UserError
from scaling.evaluators import mean_metrics
from scaling.objectives.base import Extras
from scaling.objectives.diffusion import Diffusion
from scaling.parallel import sharding, tracing
from scaling.plan import gpu_targets, hardware, hlo_cost
from scaling.run import build, state
from scaling.run.cost import run_cost
from scaling.run.options import Config
from scaling.sampling import make_sampler
from scaling.training import config

# The compiler's messages when memory runs out:
# "Used 23.05G of 15.75G hbm", or "HLO temporaries (65.02G) exceeds available HBM (15.75G)"
FULL = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGTP])\)?(?: of| exceeds)")
GIB = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10, "P": 2.0**20}  # GiB per unit of these messages


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what one chip needs and does for `request` (`plan.compiler.Request`, as a dict).

    Bad input gives {"error": one line}. Where the compiler runs out of memory, "fits" is false and
    "needed_gib" is what the program would need.
    """
    try:
        cfg = config.load(request["config"], request["overrides"])
        if not objectives.trains(cfg.objective.name):
            return {"error": f"objective.name={cfg.objective.name!r}: has no loss, and so no step to plan"}
        info, steps_known = _data_info(cfg, request["examples"], request["side"])
        run = build.build(cfg, _devices(request["topology"]), info)
        batch = request["batch"] or cfg.data.batch_size
        program, arguments = PROGRAMS[request["what"]](run, batch)
        cost = {"cost": run_cost(run)} if request["what"] == "train" else {}
    except UserError as e:
        return {"error": str(e)}
    reply: dict[str, Any] = {
        "batch": batch,
        "mesh": dict(run.mesh.shape),
        "coords": [[d.id] if d.platform == "gpu" else list(d.coords) for d in run.mesh.devices.flat],
        "sharding_notes": sharding.sharding_notes(state.abstract(run).params, run.mesh),
        "steps": run.steps if steps_known else None,
        **cost,
    }
    try:
        compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        needed = needed_gib(str(e))
        if needed is None:
            return {"error": f"topology={request['topology']}: {str(e).strip().splitlines()[0][:300]}"}
        return reply | {"fits": False, "needed_gib": needed}
    memory = compiled.memory_analysis()
    parts = {k: getattr(memory, f"{k}_size_in_bytes") for k in ("argument", "output", "alias", "temp")}
    peak = parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]
    reply |= {"fits": True, "needed_gib": (peak + memory.generated_code_size_in_bytes) / 2**30}
    chip, _ = hardware.slice_of(request["topology"])
    program_cost = hlo_cost.program_cost(compiled.as_text(), chip.flops, chip.hbm_bytes)
    return reply | {"memory": parts, "facts": dataclasses.asdict(program_cost)}


def needed_gib(message: str) -> float | None:
    """Returns what a program needs by the compiler's message, in GiB; None for another message."""
    match = FULL.search(message)
    return None if match is None else float(match[1]) * GIB[match[2]]


def _devices(topology: str) -> list[Any]:
    """Returns the chips of a topology, in arbitrary order.

    Raises:
        UserError: if the compiler knows no such topology.
    """
    kind, _, sizes = topology.partition(":")
    # The two cores of a v4 chip are one device, as on machines that are rented.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if sizes == "1x1":  # a part of a host, which otherwise has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        if kind in hardware.GPUS:
            return gpu_targets.devices(kind, int(sizes))
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
        return list(description.devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as e:
        raise UserError(f"topology={topology!r}: {str(e).strip().splitlines()[0][:200]}") from None


def _data_info(cfg: Config, examples: int | None, side: int | None) -> tuple[data.Info, bool]:
    """Returns the description of the data, and whether the run's number of steps is known.

    The description is read from the data where they are at hand. Otherwise it is what the model is made for,
    with `side` as the side of the model's input and `examples` as the number in an epoch; the number of steps
    is then unknown if the duration is in epochs and `examples` is not given.

    Raises:
        UserError: if `examples` or `side` is given although the data are at hand.
    """
    try:
        info = data.info(cfg.data)
    except UserError:
        return _info_without_data(cfg, examples, side)
    for name, value in (("examples", examples), ("side", side)):
        if value is not None:
            content = f"{info.train_examples} examples of {'x'.join(map(str, info.image_shape))}"
            raise UserError(f"{name}={value}: the data are at hand, {content}; leave it out")
    return info, True


def _info_without_data(cfg: Config, examples: int | None, side: int | None) -> tuple[data.Info, bool]:
    info = build.made_for(cfg)
    text = info.text and dataclasses.replace(info.text, mask=0)
    *frames, height, width, channels = info.image_shape
    shape = (*frames, side or height, side or width, channels)
    epoch = examples or info.train_examples  # else an epoch is one step, for want of better
    info = dataclasses.replace(info, text=text, image_shape=shape, train_examples=epoch)
    return info, examples is not None or "epoch" not in cfg.train.duration


# Programs to compile: each is a jitted function, and its arguments as shapes with shardings.


def _replicated(run: build.Run, tree: Any) -> Any:
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), tree)


def _batch_shapes(run: build.Run, size: int, key: str) -> dict[str, Any]:
    place = sharding.batch_sharding(run.mesh, size, key)
    return {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for k, s in run.batch(size).items()}


def _training_step(run: build.Run, size: int) -> tuple[Any, tuple[Any, ...]]:
    traced_hparams = _replicated(run, jax.eval_shape(lambda: state.hparam_values(run)))
    batch = _batch_shapes(run, size, "data.batch_size")
    return state.make_step(run), (state.abstract(run), batch, traced_hparams, run.helper_shapes)


def _evaluation_step(run: build.Run, size: int) -> tuple[Any, tuple[Any, ...]]:
    like, batch = state.abstract(run), _batch_shapes(run, size, "batch_size")
    mask = jax.ShapeDtypeStruct((size,), np.float32, sharding=batch["image"].sharding)
    rng = _replicated(run, jax.eval_shape(lambda: jax.random.key(0)))
    extras = Extras(like.collections, helpers=run.helper_shapes)
    return mean_metrics.step(run), (like.params, extras, batch | {"mask": mask}, rng)


def _sampler(run: build.Run, size: int) -> tuple[Any, tuple[Any, ...]]:
    if not isinstance(run.objective, Diffusion):
        raise UserError(f"what='sample': objective {run.config.objective.name} generates nothing")
    place = sharding.batch_sharding(run.mesh, size, "batch_size")
    rows = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=place)
    condition = jax.eval_shape(run.objective.conditioning.of, run.batch(size), run.helper_shapes)
    condition = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), condition)
    sampler = make_sampler(run.config.sampling, run.objective, run.image_shape)
    return jax.jit(tracing.trace_on_mesh(run.mesh, sampler)), (state.abstract(run).params, rows, condition)


PROGRAMS = {"train": _training_step, "evaluate": _evaluation_step, "sample": _sampler}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
