"""Arrays over a mesh: rules that cover everything, and the same numbers on any mesh."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from scaling import data
from scaling.errors import UserError
from scaling.parallel import sharding
from scaling.parallel.mesh import Mesh
from scaling.run import build, state
from scaling.run.options import Optimizer
from scaling.training import config

Tiny = dict[str, str]


def test_how_large_parameters_are_sharded() -> None:
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}

    def spec(path: str, *shape: int) -> P:
        return sharding.spec(path, shape, 4, mesh)

    assert spec("blocks/attention/query/kernel", 28, 1152, 16, 72) == P(None, "fsdp", "tensor", None)
    assert spec("blocks/attention/out/kernel", 28, 16, 72, 1152) == P(None, "tensor", None, "fsdp")
    assert spec("blocks/mlp/up/kernel", 28, 1152, 4608) == P(None, "fsdp", "tensor")
    assert spec("blocks/mlp/down/kernel", 28, 4608, 1152) == P(None, "tensor", "fsdp")
    assert spec("blocks/attention/query/kernel", 28, 1152, 3, 384) == P(None, "fsdp", None, None)  # 3 heads
    assert spec("label/embedding", 1001, 1152) == P(None, "tensor")  # 1001 rows; the width went to tensor
    assert spec("head/kernel", 1024, 1001) == P("fsdp", None)  # falls to the next dimension
    assert spec("blocks/mlp/up/kernel", 1, 64, 64) == P()  # under 64 KiB
    assert spec("blocks/modulation/kernel", 28, 1152, 6912) == P(None, "fsdp", "tensor")
    assert spec("blocks/attention/query/bias", 512, 16, 72) == P(None, "tensor", None)
    assert spec("stage4/blocks/conv2/kernel", 2, 3, 3, 512, 512) == P(None, None, None, None, "fsdp")
    assert spec("stage3/plain/attention/relative_bias", 9, 529, 32) == P(None, None, None)
    assert spec("text/positions", 77, 1024) == P(None, "fsdp")


def batch_of(run: build.Run, step: int) -> Any:
    cfg = run.config.data
    place = sharding.batch_sharding(run.mesh, cfg.batch_size, "data.batch_size")
    return next(iter(data.train_batches(cfg, run.config.train.seed, step, place)))


def test_what_no_axis_divides_is_listed(tiny: Tiny) -> None:
    run = build.build(
        config.load(tiny["dit"], ["model.width=172", "model.heads=1", "mesh.data=1", "mesh.fsdp=8"])
    )
    shapes = state.abstract(run).params
    *listed, small = sharding.sharding_notes(shapes, run.mesh)
    shape = (2, 172, 1, 172)
    assert (
        f"blocks/attention/query/kernel is replicated along fsdp=8, which divides none of its {shape}"
        in listed
    )
    assert not any("bias" in line for line in listed)  # replicated by their rule, not for want of one
    assert re.fullmatch(r"\d+ arrays under 64 KiB are replicated everywhere", small)
    assert sharding.sharding_notes(shapes, sharding.make_mesh(Mesh())) == []


def test_a_frozen_parameter_stays_and_the_rest_moves(tiny: Tiny) -> None:
    rules = "optimizer.param_rules=[{'match': '^blocks', 'frozen': True}, {'match': '^patch', 'lr_scale': 0}]"
    run = build.build(config.load(tiny["vit"], [rules, "optimizer.weight_decay=0.1"]))
    before = jax.tree.map(np.asarray, state.init(run).params)
    after, _ = state.make_step(run)(state.init(run), batch_of(run, 0), state.traced_hparams(run))
    changed = {
        name: any(
            bool(jnp.any(a != b))
            for a, b in zip(jax.tree.leaves(after.params[name]), jax.tree.leaves(before[name]), strict=True)
        )
        for name in before
    }
    assert not changed["blocks"] and not changed["patch"] and changed["head"]


def test_adamw_is_optax_adamw(tiny: Tiny) -> None:
    """Three steps of clipping, warm-up and decoupled decay against optax's own composition."""
    import optax

    from scaling.run import optimizer

    options = Optimizer(
        learning_rate=0.1,
        weight_decay=0.3,
        grad_clip_norm=0.5,
        schedule="cosine",
        warmup="2 steps",
        param_rules=(),
    )
    update = optimizer.make_update(options, 2, 5)
    with jax.numpy_dtype_promotion("standard"):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5)
        reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.3))
        params = theirs = {"w": jnp.asarray([1.0, -2.0, 3.0])}
        ours_state, their_state = optimizer.transform(options).init(params), reference.init(params)
        traced_hparams = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.3)}
        for i in range(3):
            grads = {"w": jnp.asarray([0.5, 1.0, -2.0]) * (i + 1)}
            params, ours_state, *_ = update(grads, ours_state, params, jnp.asarray(i), traced_hparams)
            moves, their_state = reference.update(grads, their_state, theirs)
            theirs = optax.apply_updates(theirs, moves)
    np.testing.assert_allclose(params["w"], theirs["w"], rtol=1e-6)


def test_the_average_starts_as_a_copy_and_follows(tiny: Tiny) -> None:
    run = build.build(config.load(tiny["dit"], ["optimizer.ema_decays=(0.9, 0.0)"]))
    born = state.init(run)
    first = jax.tree.map(np.asarray, born.params)
    np.testing.assert_array_equal(jax.tree.leaves(born.ema["0.9"]["params"])[0], jax.tree.leaves(first)[0])
    after, _ = state.make_step(run)(born, batch_of(run, 0), state.traced_hparams(run))
    for name, decay in (("0.9", 0.9), ("0", 0.0)):
        for a, old, new in zip(
            jax.tree.leaves(after.ema[name]["params"]), jax.tree.leaves(first), jax.tree.leaves(after.params),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(a, decay * old + (1 - decay) * np.asarray(new), atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What arranging asks of a device: of one of two slices of four."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "made up"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.id // 2 % 2, self.id // 4, 0)


def test_slices_are_apart_along_data_alone() -> None:
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    for sizes in ((2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        found = sharding.arranged(sizes, chips)
        assert found.shape == sizes and len({chip.id for chip in found.flat}) == 8
        slices = np.vectorize(lambda chip: chip.slice_index)(found)
        assert (slices == slices[:, :1, :1]).all()
        assert {len(set(column)) for column in slices[:, 0, :1].T} == {2}
    with pytest.raises(UserError, match=r"mesh\.data=1: must be a multiple of the 2 slices"):
        sharding.arranged((1, 8, 1), chips)


def test_a_mesh_elsewhere() -> None:
    """A run is read back on any number of devices: in shards where it was trained in shards."""
    for mesh, devices, expected in (
        (Mesh(2, 4), 8, (2, 4, 1)),
        (Mesh(2, 4), 1, (1, 1, 1)),
        (Mesh(2, 1, 4), 6, (3, 2, 1)),
        (Mesh(1, -1, 3), 4, (1, 4, 1)),
        (Mesh(8), 3, (3, 1, 1)),
    ):
        assert mesh.elsewhere(devices).over(devices) == dict(zip(sharding.AXES, expected, strict=True))
