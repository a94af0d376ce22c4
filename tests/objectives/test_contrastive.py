"""The contrastive losses against a loop, chunked, cached, sharded and masked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling.errors import UserError
from scaling.models import clip, vit
from scaling.models.clip import Embeddings
from scaling.objectives.base import Extras
from scaling.objectives.contrastive import Contrastive, compare, joined, split
from scaling.parallel import sharding, tracing
from scaling.parallel.mesh import Mesh
from tests.support import checks
from tests.support.toys import Towers

MODEL, SIGMOID = Towers(), Towers(logit_bias=True)
COMPARE = jax.jit(compare, static_argnums=(2, 3))


def pairs(size: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    text = rng.integers(1, 19, size=(size, 5))
    text[:, -1] = 19
    images = rng.integers(0, 256, size=(size, 8, 8, 3))
    return {"image": jnp.asarray(images, jnp.uint8), "text": jnp.asarray(text, jnp.int32)}


def task(form: str, **options: Any) -> Contrastive:
    return Contrastive(SIGMOID if form == "sigmoid" else MODEL, form=form, **options)  # type: ignore[arg-type]


def each_and_last(options: list[dict[str, int]]) -> list[Any]:
    """Every option of the softmax, and the sigmoid's last, which has all of them; its others are slow."""
    rest = [pytest.param("sigmoid", each, marks=pytest.mark.slow) for each in options[:-1]]
    return [*(("softmax", each) for each in options), ("sigmoid", options[-1]), *rest]


def by_loop(e: Embeddings, real: np.ndarray, form: str) -> dict[str, np.ndarray]:
    """One pair at a time, in float64."""
    rows = np.flatnonzero(real)
    bias = 0.0 if e.bias is None else float(e.bias)
    image, text = np.asarray(e.image, np.float64), np.asarray(e.text, np.float64)
    z = float(e.scale) * image @ text.T + bias
    out = {name: np.zeros(len(real)) for name in ("loss", "i2t_top1", "t2i_top1")}
    for i in rows:
        others = [j for j in rows if j != i]
        if form == "softmax":
            to_text = np.log(np.exp(z[i, rows] - z[i, i]).sum())
            to_image = np.log(np.exp(z[rows, i] - z[i, i]).sum())
            out["loss"][i] = (to_text + to_image) / 2
        else:
            out["loss"][i] = np.log1p(np.exp(-z[i, i])) + sum(np.log1p(np.exp(z[i, j])) for j in others)
        out["i2t_top1"][i] = all(z[i, j] < z[i, i] for j in others)
        out["t2i_top1"][i] = all(z[j, i] < z[i, i] for j in others)
    return out


def embeddings(form: str, size: int = 12) -> Embeddings:
    rng = np.random.default_rng(2)
    image = rng.normal(size=(size, 6))
    text = image + 0.7 * rng.normal(size=(size, 6))
    units = (clip.unit(jnp.asarray(x, jnp.float32)) for x in (image, text))
    return Embeddings(*units, jnp.float32(7.0), jnp.float32(-3.0) if form == "sigmoid" else None)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [12, 4, 1])
@pytest.mark.parametrize("count", [12, 7])
def test_losses_against_a_loop(form: str, chunk: int, count: int) -> None:
    real = np.arange(12) < count
    made = embeddings(form)
    found = COMPARE(made, jnp.asarray(real), form, chunk)
    expected = by_loop(made, real, form)
    assert 0 < expected["i2t_top1"].sum() < count
    for name, values in expected.items():
        np.testing.assert_allclose(np.asarray(found[name])[real], values[real], rtol=2e-5, atol=1e-6)


def assert_close(a: jax.Array, b: jax.Array) -> None:
    """To float32's rounding of the array's own size: single entries may be differences of larger ones."""
    np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-6, 1e-5 * float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("form", "options"), each_and_last([{"chunk": 4}, {"microbatch": 4}, {"chunk": 2, "microbatch": 8}])
)
def test_chunks_and_cached_gradients_change_nothing(form: str, options: dict[str, int]) -> None:
    batch, whole = pairs(16), task(form)
    params = jax.jit(whole.init)(jax.random.key(0), batch)["params"]

    def both(of: Contrastive) -> Any:
        def loss(params: Any) -> Any:
            result = of.loss(params, Extras(), batch, checks.KEY, True)
            return result.value, result.sums

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    one, other = both(whole), both(dataclasses.replace(whole, **options))
    jax.tree.map(assert_close, one, other)


def test_memory_grows_with_the_batch_and_not_its_square() -> None:
    """Of the whole gradient, as XLA compiles it: chunks of 64."""

    def room(size: int, chunk: int) -> int:
        def loss(image: jax.Array, text: jax.Array) -> jax.Array:
            both = Embeddings(image, text, jnp.float32(10.0))
            return compare(both, jnp.ones(size, bool), "softmax", chunk)["loss"].mean()

        x = jax.ShapeDtypeStruct((size, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, x).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    assert room(2048, 64) < 6 * room(512, 64)
    assert room(2048, 2048) > 12 * room(512, 512)
    assert room(2048, 64) < room(2048, 2048) / 8


def test_cached_gradients_need_less_memory() -> None:
    batch = {name: jax.ShapeDtypeStruct((256, *x.shape[1:]), x.dtype) for name, x in pairs(1).items()}
    params = jax.eval_shape(lambda: task("softmax").init(jax.random.key(0), pairs(1)))["params"]

    def room(of: Contrastive) -> int:
        def loss(params: Any, batch: Any) -> jax.Array:
            return of.loss(params, Extras(), batch, checks.KEY, True).value

        return int(
            jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
        )

    assert room(task("softmax", microbatch=16, chunk=16)) < room(task("softmax")) / 3


@pytest.mark.parametrize(
    ("form", "options"), each_and_last([{}, {"chunk": 8}, {"chunk": 8, "microbatch": 8}])
)
def test_eight_devices_give_the_loss_and_the_gradient_of_one(form: str, options: dict[str, int]) -> None:
    """The gradient as a vector, to 1e-5 of its length: single entries are differences of far larger ones."""
    of, batch = task(form, **options), pairs(32)
    params = jax.jit(of.init)(jax.random.key(0), batch)["params"]
    mesh = sharding.make_mesh(Mesh())
    place = sharding.batch_sharding(mesh, 32, "batch_size")

    def loss(params: Any, batch: Any) -> jax.Array:
        return of.loss(params, Extras(), batch, checks.KEY, True).value

    one, whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    step = jax.jit(tracing.trace_on_mesh(mesh, jax.value_and_grad(loss)))
    eight, split_up = step(
        jax.device_put(params, NamedSharding(mesh, PartitionSpec())), jax.device_put(batch, place)
    )
    assert float(eight) == pytest.approx(float(one), rel=1e-5)
    vectors = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (whole, split_up)]
    assert np.linalg.norm(vectors[0] - vectors[1]) < 1e-5 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_masked_pairs_are_nobodys_negatives(form: str) -> None:
    """The metrics of 11 pairs of 16 are those of the 11 alone."""
    batch, of = pairs(16), task(form)
    params = jax.jit(of.init)(jax.random.key(0), batch)["params"]
    mask = (jnp.arange(16) < 11).astype(jnp.float32)
    loss = jax.jit(lambda batch: of.loss(params, Extras(), batch, checks.KEY, False))
    masked, alone = loss({**batch, "mask": mask}), loss({k: v[:11] for k, v in batch.items()})
    assert set(masked.sums) == {"loss", "i2t_top1", "t2i_top1"}
    for name in masked.sums:
        assert masked.counts[name] == 11.0
        assert masked.sums[name] == pytest.approx(float(alone.sums[name]), rel=1e-5)


def test_it_starts_at_chance() -> None:
    """Of N pairs that a model cannot tell apart, ln N; of the sigmoid's, nearly nothing but its own bias."""
    rng = np.random.default_rng(0)
    far = clip.unit(jnp.asarray(rng.normal(size=(64, 4096)), jnp.float32))
    other = clip.unit(jnp.asarray(rng.normal(size=(64, 4096)), jnp.float32))
    found = COMPARE(Embeddings(far, other, jnp.float32(1.0)), jnp.ones(64, bool), "softmax", 64)
    assert float(found["loss"].mean()) == pytest.approx(np.log(64), abs=0.02)
    model = clip.make("ViT-F/16", depth=1, text_depth=1, logit_bias=True, unroll=True)
    variables = jax.jit(model.init)(
        jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 5), jnp.int32)
    )
    assert variables["params"]["logit_bias"] == -10.0
    assert np.exp(variables["params"]["logit_scale"]) == pytest.approx(10.0)


def test_parts_have_rows_of_every_device() -> None:
    x = jnp.arange(24).reshape(12, 2)
    parts = split(x, 4, "chunk")
    assert parts.shape == (3, 4, 2) and parts[0, :, 0].tolist() == [0, 6, 12, 18]
    np.testing.assert_array_equal(joined(parts), x)


def test_no_embedding_is_gathered_into_square_logits() -> None:
    """On eight devices no array of the compiled gradient has the size of all logits of the batch."""
    of, batch = task("softmax", chunk=8), pairs(64)
    params = jax.jit(of.init)(jax.random.key(0), batch)["params"]
    mesh = sharding.make_mesh(Mesh())
    place = sharding.batch_sharding(mesh, 64, "batch_size")

    def loss(params: Any, batch: Any) -> jax.Array:
        return of.loss(params, Extras(), batch, checks.KEY, True).value

    placed = jax.device_put(batch, place)
    step = jax.jit(tracing.trace_on_mesh(mesh, jax.grad(loss)))
    text = step.lower(params, placed).compile().as_text()
    assert "f32[64,64]" not in text and "f32[8,64]" not in text
    of = task("softmax")  # at once and on one device, they are there
    assert "f32[64,64]" in jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"form": "hinge"}, "form='hinge': must be one of softmax, sigmoid"),
        ({"chunk": 0}, "chunk=0: must be at least 1"),
        ({"microbatch": -1}, "microbatch=-1: must be at least 1"),
        ({"form": "sigmoid"}, "form='sigmoid': needs --config.model.logit_bias=True"),
    ):
        with pytest.raises(UserError, match=message):
            Contrastive(MODEL, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model=ViT: has no two towers"):
        Contrastive(vit.make("A/7"))
    batch = pairs(12)
    params = jax.eval_shape(task("softmax").init, jax.random.key(0), batch)["params"]
    for key in ("chunk", "microbatch"):
        of = task("softmax", **{key: 5})
        with pytest.raises(UserError, match=f"{key}=5: must divide the batch of 12"):
            jax.eval_shape(
                lambda params, of=of: of.loss(params, Extras(), batch, checks.KEY, True).value, params
            )
    with pytest.raises(UserError, match="needs images with captions"):
        task("softmax").init(jax.random.key(0), {"image": batch["image"]})
