import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scaling.errors import UserError
from scaling.models.vilt import ViLT
from scaling.objectives import classification, make
from scaling.objectives.base import Extras, Loss
from scaling.objectives.classification import Classification
from tests.support.checks import KEY, check_eight_devices, images

BOTH = {"mixup": 0.8, "cutmix": 1.0}


class Linear(nn.Module):
    num_classes: int = 10
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.stem = nn.Dense(6, dtype=self.dtype)
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.head(self.features(x))

    def features(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.stem(x.reshape(x.shape[0], -1)))


class Normed(nn.Module):
    """With a collection that training updates, and dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, use_fast_variance=False)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


def _batch(size: int = 16, classes: int = 10) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": images(size, channels=1),
        "label": jnp.asarray(rng.integers(0, classes, size=size), jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=(0, 2))
def _loss(
    task: Classification, batch: dict[str, jax.Array], train: bool = True, rng: jax.Array = KEY
) -> Loss:
    params = task.init(jax.random.key(0), batch)["params"]
    return task.loss(params, Extras(), batch, rng, train)


def _logits(batch: dict[str, jax.Array], image: np.ndarray | None = None) -> np.ndarray:
    x = np.asarray(batch["image"], np.float32) / 127.5 - 1.0 if image is None else image
    return np.asarray(_apply(batch, jnp.asarray(x, jnp.float32)))


@jax.jit
def _apply(batch: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    params = Classification(Linear()).init(jax.random.key(0), batch)["params"]
    return Linear().apply({"params": params}, x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_cross_entropy(smoothing: float) -> None:
    batch = _batch()
    logits, labels = (
        torch.from_numpy(_logits(batch).copy()),
        torch.from_numpy(np.array(batch["label"])).long(),
    )
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).item()
    found = _loss(Classification(Linear(), label_smoothing=smoothing), batch)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.sums["loss"] / found.counts["loss"] == pytest.approx(expected, rel=1e-5)
    top5 = (torch.topk(logits, 5).indices == labels[:, None]).any(dim=1).sum().item()
    assert found.sums["top5"] == top5
    assert found.sums["top1"] == (logits.argmax(dim=1) == labels).sum().item()
    assert set(found.sums) == set(found.counts) == {"loss", "top1", "top5"}


@pytest.mark.parametrize("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}, BOTH])
def test_evaluation_has_neither_smoothing_nor_mixing(mixing: dict[str, float]) -> None:
    batch = _batch()
    plain = _loss(Classification(Linear()), batch, train=False)
    task = Classification(Linear(), label_smoothing=0.3, **mixing)
    assert _loss(task, batch, train=False).value == plain.value
    assert _loss(task, batch, train=True).value != plain.value


def test_mixup_mixes_images_and_labels_by_one_share() -> None:
    batch = _batch()
    found = float(_loss(Classification(Linear(), mixup=0.5), batch).value)
    x, onehot = np.asarray(batch["image"], np.float64) / 127.5 - 1.0, np.eye(10)[np.asarray(batch["label"])]

    def mixed(share: float) -> float:
        logits = _logits(batch, share * x + (1 - share) * np.roll(x, 1, axis=0)).astype(np.float64)
        targets = share * onehot + (1 - share) * np.roll(onehot, 1, axis=0)
        return float(
            -(targets * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1).mean()
        )

    shares = np.linspace(0.0, 1.0, 201)
    assert np.abs(np.array([mixed(share) for share in shares]) - found).min() < 2e-3
    assert found != _loss(Classification(Linear(), mixup=0.5), batch, rng=jax.random.key(8)).value


class Seen(nn.Module):
    """Keeps the images that it is shown as a collection; logits that make the loss tell the targets."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        self.variable("seen", "images", jnp.zeros, x.shape).value = x
        return jnp.eye(len(x)) * 1000.0


@functools.cache
def _mixed(**mixing: float) -> tuple[np.ndarray, np.ndarray]:
    """(kept [300, H, W], share [300]): what images kept of themselves and of their labels, a batch a seed.

    Image i is i everywhere and of class i, so that what is seen tells what it is made of.
    """
    size, side = 16, 8
    flat = jnp.arange(size, dtype=jnp.float32)[:, None, None, None]
    batch = {
        "image": jnp.broadcast_to(flat, (size, side, side, 1)),
        "label": jnp.arange(size, dtype=jnp.int32),
    }
    task = Classification(Seen(), **mixing)
    extras = Extras(collections={"seen": {"images": jnp.zeros((size, side, side, 1))}})

    @jax.jit
    @jax.vmap
    def losses(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = task.loss({}, extras, batch, jax.random.key(seed), True)
        return found.collections["seen"]["images"][..., 0], found.value

    seen, values = jax.device_get(losses(jnp.arange(300)))  # [300, B, H, W]
    kept = seen[:, 1:] - np.arange(size - 1)[:, None, None]  # image i becomes i - 1 + kept
    assert np.ptp(kept, axis=1).max() < 1e-4  # one mixture for the whole batch
    np.testing.assert_allclose(seen[:, 0], (1 - kept[:, 0]) * (size - 1), atol=1e-3)
    return kept[:, 0], 1.0 - values / 1000.0  # the class of the neighbour has a logit 1000 lower


def test_cutmix_pastes_a_box_of_the_neighbour_and_its_share_of_the_label() -> None:
    areas, corners = [], set()
    for kept, share in zip(*_mixed(cutmix=1.0), strict=True):
        rows, columns = np.flatnonzero((kept < 0.5).any(1)), np.flatnonzero((kept < 0.5).any(0))
        box = np.ones_like(kept)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0.0
            corners.add((int(rows[0]), int(columns[0])))
        np.testing.assert_allclose(kept, box, atol=1e-5)  # a box, nothing in between
        assert share == pytest.approx(box.mean(), abs=1e-5)  # exact, also where the border cuts it
        areas.append(1.0 - box.mean())
    assert min(areas) < 0.05 and max(areas) > 0.5
    assert 0.2 < np.mean(areas) < 0.4  # half, but for what the border cuts off and what rounding takes
    assert len(corners) > 25


def test_with_mixup_and_cutmix_each_batch_has_one_of_them() -> None:
    boxes = 0
    both, mixup, cutmix = (
        list(zip(*_mixed(**m), strict=True)) for m in (BOTH, {"mixup": 0.8}, {"cutmix": 1.0})
    )
    for (kept, share), (even, even_share), (box, box_share) in zip(both, mixup, cutmix, strict=True):
        cut = not np.allclose(kept, even, atol=1e-5)
        np.testing.assert_allclose(kept, box if cut else even, atol=1e-5)
        assert share == pytest.approx(box_share if cut else even_share, abs=1e-5)
        boxes += cut
    assert 115 < boxes < 185


def test_every_frame_of_a_video_has_the_same_box() -> None:
    kept, share = classification._outside_a_box(KEY, 1.0, (2, 3, 8, 6, 1))
    assert kept.shape == (1, 1, 8, 6, 1) and 0.0 < share < 1.0
    assert kept.mean() == pytest.approx(float(share))


def test_a_padded_and_masked_batch_counts_as_the_real_examples() -> None:
    batch = _batch(12)
    padded = {
        "image": jnp.concatenate([batch["image"], jnp.full((4, 4, 4, 1), 255, jnp.uint8)]),
        "label": jnp.concatenate([batch["label"], jnp.zeros((4,), jnp.int32)]),
        "mask": jnp.array([1.0] * 12 + [0.0] * 4),
    }
    whole, masked = (_loss(Classification(Linear()), b, train=False) for b in (batch, padded))
    assert masked.value == pytest.approx(float(whole.value), rel=1e-6)
    for name in whole.sums:
        assert masked.sums[name] == pytest.approx(float(whole.sums[name]), rel=1e-6)
        assert masked.counts[name] == 12.0
    nothing = _loss(Classification(Linear()), {**padded, "mask": jnp.zeros((16,))}, train=False)
    assert nothing.value == 0.0 and nothing.counts["loss"] == 0.0


def test_collections_are_updated_in_training_only() -> None:
    task, batch = Classification(Normed()), _batch()
    variables = dict(task.init(jax.random.key(0), batch))
    params = variables.pop("params")
    assert set(variables) == {"batch_stats"}
    extras = Extras(collections=variables)
    before = variables["batch_stats"]["BatchNorm_0"]["mean"]
    trained = task.loss(params, extras, batch, KEY, train=True)
    assert jnp.abs(trained.collections["batch_stats"]["BatchNorm_0"]["mean"] - before).max() > 0.0
    evaluated = task.loss(params, extras, batch, KEY, train=False)
    assert (evaluated.collections["batch_stats"]["BatchNorm_0"]["mean"] == before).all()
    assert trained.value == task.loss(params, extras, batch, KEY, train=True).value
    assert trained.value != task.loss(params, extras, batch, jax.random.key(8), train=True).value  # dropout


@pytest.mark.parametrize("mixing", [pytest.param({}, marks=pytest.mark.slow), BOTH])
def test_eight_devices_give_the_loss_and_the_gradient_of_one(mixing: dict[str, float]) -> None:
    check_eight_devices(Classification(Normed(), **mixing), _batch())


def test_bfloat16_logits_give_a_float32_loss() -> None:
    found = _loss(Classification(Linear(dtype=jnp.bfloat16)), _batch())
    assert found.value.dtype == jnp.float32
    assert found.value == pytest.approx(float(_loss(Classification(Linear()), _batch()).value), rel=0.02)


def test_features_are_the_models_of_scaled_images() -> None:
    task, batch = Classification(Linear()), _batch(3)
    params = task.init(jax.random.key(0), batch)["params"]
    found = task.features(params, Extras(), batch)
    scaled = {"image": jnp.asarray(np.asarray(batch["image"], np.float32) / 127.5 - 1.0)}
    assert found.shape == (3, 6) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, task.features(params, Extras(), scaled), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"^label_smoothing=1.0: must be in \[0, 1\)$"),
        ({"mixup": -0.1}, r"^mixup=-0.1: "),
        ({"cutmix": -1.0}, r"^cutmix=-1.0: must be 0 \(none\) or a positive alpha$"),
        (
            {"smoothing": 0.1},
            r"^smoothing=0.1: not an option of classification, which has label_smoothing, mixup, cutmix$",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("classification", Linear(), **options)


def test_unknown_objectives_are_named() -> None:
    known = "classification, contrastive, diffusion, autoencoder, vision_language, frozen"
    with pytest.raises(UserError, match=f"^objective='regression': must be one of {known}$"):
        make("regression", Linear())


def _asked(tasks: tuple[str, ...]) -> tuple[Any, dict[str, jax.Array]]:
    """A tiny ViLT, and 16 texts whose first word is the label, of an image or of two."""
    model: Any = ViLT(
        patch=2, width=16, depth=1, heads=2, vocabulary=8, length=4, num_classes=2, tasks=tasks, resolution=4
    )  # type: ignore[arg-type]
    label = jnp.arange(16) % 2
    image = images(32 if "nlvr2" in tasks else 16, channels=3)
    return model, {
        "image": image.reshape(16, 2, 4, 4, 3) if "nlvr2" in tasks else image,
        "label": label,
        "text": jnp.zeros((16, 4), jnp.int32).at[:, 1].set(2 + label),
        "text_mask": jnp.ones((16, 4), bool),
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", ["vqa", "nlvr2"])
def test_answers_and_paired_reasoning_learn_from_text(head: str) -> None:
    """What only the text tells is learned in a few steps; the loss is the cross-entropy of that head."""
    model, batch = _asked((head,))
    task = Classification(model)
    params = task.init(jax.random.key(0), batch)["params"]

    @jax.jit
    def step(params: Any) -> Any:
        value, grads = jax.value_and_grad(lambda p: task.loss(p, Extras(), batch, KEY, True).value)(params)
        return value, jax.tree.map(lambda p, g: p - 5e-3 * jnp.sign(g), params, grads)

    out: Any = jax.jit(model.apply)(
        {"params": params},
        jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1,
        batch["text"],
        batch["text_mask"],
    )
    first, params = step(params)
    right = jax.nn.log_softmax(out[head])[jnp.arange(16), batch["label"]]
    assert float(first) == pytest.approx(-float(right.mean()), rel=1e-4)
    for _ in range(40):
        last, params = step(params)
    assert float(last) < 0.5 * float(first)
    np.testing.assert_array_equal(task.logits(params, Extras(), batch).argmax(axis=1), batch["label"])


def test_what_a_model_that_reads_texts_needs_is_said() -> None:
    model, batch = _asked(("vqa",))
    with pytest.raises(UserError, match=r"tasks=\('itm',\): model\.tasks must have vqa or nlvr2"):
        Classification(model.clone(tasks=("itm",)))
    with pytest.raises(UserError, match=r"mixup=0\.2.*: texts cannot be mixed"):
        Classification(model, mixup=0.2)
    with pytest.raises(UserError, match=r"classification: the task vqa needs texts"):
        Classification(model).init(KEY, {"image": batch["image"]})
