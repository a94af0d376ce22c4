"""The training step of `scaling train`, with batches that are on the device already."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cases import Case

from scaling.parallel import sharding
from scaling.plan import compile
from scaling.run import build, state
from scaling.training import config


def run(case: Case, batch: int, dtype: str, *more: str) -> build.Run:
    run_of = (f"data.batch_size={batch}", f"model.dtype='{dtype}'", "train.duration='1000000 steps'")
    cfg = config.load(case.config, [*case.overrides, *run_of, *more])
    return build.build(cfg, info=build.made_for(cfg))


def random_batch(made: build.Run) -> Any:
    rng = np.random.default_rng(0)

    def one(like: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(like.dtype, np.integer):
            return rng.integers(0, 255 if like.dtype == np.uint8 else 1000, like.shape).astype(like.dtype)
        return rng.standard_normal(like.shape).astype(like.dtype)

    size = made.config.data.batch_size
    found = {name: one(like) for name, like in made.batch(size).items()}
    return jax.device_put(found, sharding.batch_sharding(made.mesh, size, "batch"))


def step(made: build.Run) -> Callable[[int], float]:
    """`run(steps) -> loss`."""
    batch, advance, hparam_values = random_batch(made), state.make_step(made), state.traced_hparams(made)
    current = state.init(made)

    def run(steps: int) -> float:
        nonlocal current
        for _ in range(steps):
            current, metrics = advance(current, batch, hparam_values)
        loss = float(metrics["loss"])
        jax.block_until_ready(current)
        return loss

    return run


def sampler(made: build.Run) -> Callable[[int], float]:
    """`run(calls)`: each samples a batch."""
    program, (_, indices, labels) = compile.PROGRAMS["sample"](made, made.config.data.batch_size)
    params = state.init(made).params
    given = jax.device_put(np.arange(len(indices), dtype=np.int32), indices.sharding)
    classes = jax.device_put(np.arange(len(labels), dtype=np.int32), labels.sharding)

    def run(calls: int) -> float:
        for _ in range(calls):
            images = jax.block_until_ready(program(params, given, classes))
        return float(images.mean())

    return run


def lowered(made: build.Run) -> Any:
    """The step, ready to be compiled."""
    program, arguments = compile.PROGRAMS["train"](made, made.config.data.batch_size)
    return program.lower(*arguments)
