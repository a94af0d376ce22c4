"""What the tests of objectives share: what holds of every one, and a small denoiser."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling.objectives.base import Extras

KEY = jax.random.key(7)


class Denoiser(nn.Module):
    """With the signature of DiT, every argument of which counts."""

    num_classes: int = 5
    learn_sigma: bool = False
    half: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        channels = x.shape[-1] * (2 if self.learn_sigma else 1)
        label = nn.Embed(self.num_classes + 1, channels, embedding_init=nn.initializers.normal(1.0))(y)
        out = jnp.tanh(nn.Dense(channels)(x) + jnp.sin(t)[:, None, None, None] + label[:, None, None])
        return out.astype(jnp.bfloat16) if self.half else out


def images(size: int, channels: int) -> jax.Array:
    """uint8 [size, 4, 4, channels]."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, size=(size, 4, 4, channels)), jnp.uint8)


def check_eight_devices(task: Any, batch: dict[str, jax.Array]) -> None:
    """They give the loss and the gradient of one."""
    variables = dict(jax.jit(task.init)(jax.random.key(0), batch))
    params, extras = variables.pop("params"), Extras(collections=variables)

    @jax.jit
    def value_and_grad(params: Any, batch: dict[str, jax.Array]) -> Any:
        return jax.value_and_grad(lambda p: task.loss(p, extras, batch, KEY, True).value)(params)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    one = value_and_grad(params, batch)
    eight = value_and_grad(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight)


def check_masked(task: Any, batch: dict[str, jax.Array], names: set[str]) -> None:
    """Of a masked batch only the real examples weigh, in all sums, which have these names.

    Noise is shaped by the whole batch, so that other rows change nothing, however wild they are.
    """
    params = jax.jit(task.init)(jax.random.key(0), batch)["params"]
    real = jnp.arange(len(batch["image"])) < 11
    mask = real.astype(jnp.float32)
    calm = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    wild = jnp.where(real[:, None, None, None], calm, jnp.inf)

    of = jax.jit(lambda batch: task.loss(params, Extras(), batch, KEY, False))

    def loss(**changed: jax.Array) -> Any:
        return of({**batch, **changed})

    kept, same = (loss(mask=mask, image=x) for x in (calm, wild))
    whole, rest = loss(), loss(mask=1.0 - mask)
    assert set(kept.sums) == set(kept.counts) == names
    for name in names:
        assert kept.counts[name] == 11.0
        assert same.sums[name] == kept.sums[name]
        assert whole.sums[name] == pytest.approx(float(kept.sums[name] + rest.sums[name]), rel=1e-5)
    assert kept.value == pytest.approx(float(kept.sums["loss"]) / 11.0, rel=1e-6)
