"""Every family on every mesh: one device's loss, gradients, statistics, samples; and never a whole array."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import data
from scaling.parallel import sharding, tracing
from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints
from scaling.sampling import Sampling, make_sampler
from scaling.training import config
from tests.support.running import largest_error

ROOT = Path(__file__).parents[2]
BATCH = 16
ALL = "data=2 fsdp=2 tensor=2"
MESHES = ["data=8", "fsdp=8", "fsdp=4 tensor=2", ALL]
WORDS = data.TextInfo(vocabulary=600, length=12, digest="", mask=4)
SMALL = dict(width=128, depth=2, heads=2)  # wide enough for the rules to cut; two layers, to be a loop
TOWER = dict(text_width=128, text_depth=2, text_heads=2, embed_dim=64)


def info(*shape: int, text: data.TextInfo | None = None) -> data.Info:
    return data.Info("made up", 0 if text else 8, shape, 64, text=text)


FAMILIES: dict[str, tuple[str, dict[str, Any], data.Info]] = {
    "dit": ("mnist_dit.py:F/7", SMALL, info(14, 14, 1)),
    "vit": ("mnist_vit.py:F/7", SMALL, info(14, 14, 1)),
    "resnet": ("mnist_resnet.py:F", dict(width=64, depths=(3,)), info(8, 8, 1)),
    "swin": ("mnist_swin.py:F", dict(width=128, depths=(2,), heads=(2,)), info(28, 28, 1)),
    "clip": ("openmoji_clip.py:ViT-N/8", SMALL | TOWER, info(16, 16, 3, text=WORDS)),
    "vilt": ("openmoji_vilt.py:F/8", SMALL, info(16, 16, 3, text=WORDS)),
    "vivit": ("mnist_vivit.py:joint", SMALL, info(8, 14, 14, 1)),
    "timesformer": ("mnist_vivit.py:divided", SMALL, info(4, 14, 14, 1)),
    "unet": (
        "mnist_unet.py",
        dict(width=64, multipliers=(1,), depth=1, attention=(1,), head_width=32, groups=8),
        info(8, 8, 1),
    ),
    "vae": ("mnist_vae.py", dict(widths=(64,), groups=8), info(8, 8, 1)),
    "three heads": ("mnist_vit.py:F/7", dict(width=96, depth=2, heads=3), info(14, 14, 1)),
    "long video": ("mnist_vivit.py:joint", SMALL, info(2, 21, 35, 1)),  # 15 patches and the class token
}


SGD = dict(name="sgd", learning_rate=1.0, b1=0.0)


def built_on(family: str, mesh: str, update: dict[str, Any] = SGD) -> build.Run:
    """One step's worth of the family; "" is one device."""
    source, sizes, made_up = FAMILIES[family]
    update = update | dict(schedule="constant", warmup="0 steps")
    chosen = {f"model.{key}": value for key, value in sizes.items()}
    chosen |= {f"optimizer.{key}": value for key, value in update.items()}
    chosen |= {
        "optimizer.weight_decay": 0.0,
        "optimizer.grad_clip_norm": None,
        "optimizer.ema_decays": (0.5,),
    }
    chosen |= {"data.batch_size": BATCH, "mesh.data": 1}
    chosen |= {f"mesh.{axis}": int(size) for axis, size in (pair.split("=") for pair in mesh.split())}
    cfg = config.load(str(ROOT / "configs" / source), chosen)
    return build.build(cfg, None if mesh else jax.devices()[:1], made_up)


def batch_of(run: build.Run) -> dict[str, jax.Array]:
    rng, place = np.random.default_rng(0), sharding.batch_sharding(run.mesh, BATCH, "data.batch_size")
    classes = run.info.num_classes or WORDS.vocabulary

    def values(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if name in ("text_mask", "text_word"):
            return np.ones(like.shape, like.dtype)
        high = 256 if like.dtype == np.uint8 else classes
        return rng.integers(0, high, like.shape).astype(like.dtype)

    return {name: jax.device_put(values(name, like), place) for name, like in run.batch(BATCH).items()}


def started(run: build.Run) -> state.State:
    """A state whose weights are none of them 0, so that no part is silent; what else there is is 1."""
    rng, like = np.random.default_rng(1), state.abstract(run)
    params = jax.tree.map(lambda s: (0.1 * rng.standard_normal(s.shape)).astype(np.float32), like.params)
    filled = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), like).replace(params=params)
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), filled, like)


def one_step(run: build.Run) -> tuple[Any, state.State, dict[str, float]]:
    """The gradient, the state after it, and the metrics."""
    before = started(run)
    held = jax.tree.map(np.asarray, before.params)
    after, metrics = state.make_step(run)(before, batch_of(run), state.traced_hparams(run))
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), held, after.params)
    return gradient, after, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {}


# On the mesh that has all three axes one family of each kind, and what no axis divides; the rest is slow.
KINDS = ("dit", "vit", "resnet", "clip", "three heads")
FAST = [(family, ALL) for family in KINDS]
REST = [(family, mesh) for family in FAMILIES for mesh in MESHES if (family, mesh) not in FAST]


@pytest.mark.parametrize(
    ("family", "mesh"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_any_mesh_gives_one_devices_numbers(family: str, mesh: str, single: dict[str, Any]) -> None:
    if family not in single:
        single[family] = one_step(built_on(family, ""))
    expected, whole, expected_metrics = single[family]
    gradient, after, metrics = one_step(built_on(family, mesh))
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)
    assert largest_error(gradient, expected) < 2e-4
    for a, b in zip(jax.tree.leaves(after.collections), jax.tree.leaves(whole.collections), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    averaged = after.ema["0.5"]["params"], whole.ema["0.5"]["params"]
    for a, b in zip(*map(jax.tree.leaves, averaged), strict=True):
        assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[pytest.mark.slow] * (mesh != MESHES[-1])) for mesh in MESHES[1:]]
)
def test_no_device_ever_holds_a_whole_array(mesh: str, tmp_path: Path) -> None:
    """Of what is cut, a device has its shard: when it is made, in a step, and when it is restored."""
    run = built_on("dit", mesh, dict(name="adamw"))
    like = state.abstract(run)
    cut = [s for s in jax.tree.leaves(like) if any(s.sharding.spec)]
    kernels = [s for s in jax.tree.leaves(like.params) if any(s.sharding.spec)]
    assert len(cut) == 4 * len(kernels) > 20  # and the average and two moments of each
    whole = {",".join(map(str, s.shape)) for s in cut}
    made = state.initialiser(run).lower(state.traced_hparams(run)["seed"]).compile().as_text()
    assert not whole & set(re.findall(r"\[([\d,]+)\]", made))
    born = state.init(run)
    stepped = state.make_step(run).lower(born, batch_of(run), state.traced_hparams(run)).compile().as_text()
    stacked = {shape for shape in whole if shape.startswith("2,")}  # a layer at a time is gathered
    assert stacked and not stacked & set(re.findall(r"\[([\d,]+)\]", stepped))
    after, _ = state.make_step(run)(born, batch_of(run), state.traced_hparams(run))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, after, {})
        checkpoints.wait()
        found = checkpoints.restore(like)
    assert found is not None
    for kept in (after, found[0]):
        for expected, x in zip(jax.tree.leaves(like), jax.tree.leaves(kept), strict=True):
            assert x.sharding.is_equivalent_to(expected.sharding, x.ndim)
            ways = np.prod([run.mesh.shape[axis] for axis in expected.sharding.spec if axis], dtype=int)
            assert all(s.data.size * ways == x.size for s in x.addressable_shards)


DRAWN = [("dit", ALL)]
OTHERS = [(family, mesh) for family in ("dit", "unet") for mesh in MESHES if (family, mesh) not in DRAWN]


@pytest.mark.parametrize(
    ("family", "mesh"), [*DRAWN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_samples_are_one_devices(family: str, mesh: str) -> None:
    def images(mesh: str) -> Any:
        run = built_on(family, mesh)
        sampler = make_sampler(Sampling(integrator="euler", steps=2), run.objective, run.image_shape)
        draw = tracing.jit_replicated(run.mesh, sampler)
        return np.asarray(draw(started(run).params, jnp.arange(8), jnp.arange(8) % 10))

    assert largest_error(images(mesh), images("")) < 2e-4


def test_tokens_of_joint_attention_lie_across_tensor() -> None:
    """Between the layers of a model of long videos a device has half of the 16 tokens, within them all."""
    run = built_on("long video", "data=4 tensor=2")
    step = state.make_step(run).lower(state.abstract(run), batch_of(run), state.traced_hparams(run))
    text = step.compile().as_text()
    assert "f32[4,8,128]" in text and "f32[4,16,128]" in text
