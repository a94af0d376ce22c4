"""The update's options against PyTorch's, and rates that fall with depth in every family that has layers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict

from scaling import models
from scaling.errors import UserError
from scaling.parallel import sharding
from scaling.run import build, layer_decay, optimizer, state
from scaling.run.options import Optimizer, ParamRule
from scaling.training import config, loop
from tests.support.running import named

Tiny = dict[str, str]
GRADS = [np.array([0.5, 1.0, -2.0], np.float32) * (i + 1) for i in range(7)]


def steps(
    options: Optimizer,
    warmup: int = 0,
    total: int = 7,
    milestones: tuple[int, ...] = (),
    cooldown: int = 0,
) -> np.ndarray:
    """The parameters [7, 3] after each of seven updates from (1, -2, 3)."""
    update = optimizer.make_update(options, warmup, total, milestones, cooldown)
    params = {"w": jnp.asarray([1.0, -2.0, 3.0])}
    kept, seen = optimizer.transform(options).init(params), []
    traced_hparams = {
        "learning_rate": jnp.float32(options.learning_rate),
        "weight_decay": jnp.float32(options.weight_decay),
    }
    for i, grad in enumerate(GRADS):
        params, kept, *_ = update({"w": jnp.asarray(grad)}, kept, params, jnp.asarray(i), traced_hparams)
        seen.append(np.asarray(params["w"]))
    return np.stack(seen)


def test_sgd_with_l2_and_drops_is_pytorchs() -> None:
    """Momentum, L2 in the gradient after clipping, a rate that falls to a tenth twice."""
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    theirs = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, [2, 5])
    expected = []
    for grad in GRADS:
        w.grad = torch.from_numpy(grad.copy())
        torch.nn.utils.clip_grad_norm_([w], 1.5)
        theirs.step()
        schedule.step()
        expected.append(w.detach().numpy().copy())
    options = Optimizer(
        name="sgd", learning_rate=0.1, weight_decay=0.3, weight_decay_mode="l2", grad_clip_norm=1.5,
        param_rules=(), schedule="step", lr_milestones=("2 steps", "5 steps"),
    )  # fmt: skip
    np.testing.assert_allclose(steps(options, milestones=(2, 5)), expected, rtol=1e-5)


def test_drops_count_from_the_start_of_the_run_warm_up_and_all() -> None:
    plain = {"name": "sgd", "b1": 0.0, "learning_rate": 1.0, "param_rules": ()}
    options = Optimizer(**plain, schedule="step", lr_milestones=("4 steps", "6 steps"))
    moved = -np.diff(
        steps(options, warmup=2, milestones=(4, 6)), axis=0, prepend=[[1.0, -2.0, 3.0]]
    ) / np.stack(GRADS)
    np.testing.assert_allclose(moved.mean(axis=1), [0.0, 0.5, 1.0, 1.0, 0.1, 0.1, 0.01], rtol=1e-4, atol=1e-6)


def test_wsd_is_constant_until_it_cools_down_by_the_root_of_the_time() -> None:
    plain = {"name": "sgd", "b1": 0.0, "learning_rate": 1.0, "param_rules": ()}
    options = Optimizer(**plain, schedule="wsd", cooldown="4 steps", final_lr_ratio=0.2)
    moved = -np.diff(steps(options, warmup=2, total=7, cooldown=4), axis=0, prepend=[[1.0, -2.0, 3.0]])
    cooling = [1 - 0.8 * (n / 4) ** 0.5 for n in range(4)]
    expected = [0.0, 0.5, 1.0, *cooling]  # two of warm-up, one stable, four that cool down
    np.testing.assert_allclose((moved / np.stack(GRADS)).mean(axis=1), expected, rtol=1e-4, atol=1e-6)


def test_l2_leaves_out_what_the_rules_leave_out() -> None:
    rules = (ParamRule("^w", weight_decay=0.0),)
    sgd = {"name": "sgd", "learning_rate": 0.1, "weight_decay_mode": "l2"}
    without = steps(Optimizer(**sgd))
    np.testing.assert_array_equal(steps(Optimizer(**sgd, weight_decay=0.3, param_rules=rules)), without)
    assert (steps(Optimizer(**sgd, weight_decay=0.3, param_rules=())) != without).all()
    frozen = steps(Optimizer(**sgd, weight_decay=0.3, param_rules=(ParamRule("^w", frozen=True),)))
    np.testing.assert_array_equal(frozen, [[1.0, -2.0, 3.0]] * 7)


def test_a_cosine_ends_at_its_floor() -> None:
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    theirs = torch.optim.SGD([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 6, eta_min=0.02)
    expected = []
    for grad in GRADS:
        w.grad = torch.from_numpy(grad.copy())
        theirs.step()
        schedule.step()
        expected.append(w.detach().numpy().copy())
    options = Optimizer(
        name="sgd", b1=0.0, learning_rate=0.1, schedule="cosine", final_lr_ratio=0.2, param_rules=()
    )  # fmt: skip
    np.testing.assert_allclose(steps(options, total=6), expected, rtol=1e-5)


# Layers of 4 blocks (6 of the Swin): what is before them is 0, head and last norm are one more than the last.
LAYERS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "vit": (
        {"variant": "A/7", "depth": 4},
        {
            "patch/kernel": [0], "positions": [0], "token": [0], "blocks/mlp/up/kernel": [1, 2, 3, 4],
            "blocks/attention/query/bias": [1, 2, 3, 4], "norm/scale": [5], "head/bias": [5],
        },
    ),
    "swin": (
        {"variant": "T", "width": 8, "depths": (2, 4), "heads": (2, 4), "resolution": 28},
        {
            "patch/kernel": [0], "norm_patch/bias": [0], "stage1/plain/mlp/up/kernel": [1],
            "stage1/shifted/attention/relative_bias": [2], "merging2/reduction/kernel": [2],
            "stage2/plain/norm_mlp/scale": [3, 5], "stage2/shifted/mlp/down/bias": [4, 6],
            "norm/scale": [7], "head/kernel": [7],
        },
    ),
    "resnet": (
        {"variant": "18", "width": 4, "depths": (1, 3)},
        {
            "stem/kernel": [0], "norm_stem/scale": [0], "stage1/first/conv1/kernel": [1],
            "stage2/first/shortcut/kernel": [2], "stage2/blocks/conv2/kernel": [3, 4], "head/kernel": [5],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_every_parameter_has_the_rate_of_its_layer(family: str) -> None:
    given, expected = LAYERS[family]
    variant, options = given["variant"], {k: v for k, v in given.items() if k != "variant"}
    model = models.make(family, variant, **options)
    x = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    last = max(layer for layers in expected.values() for layer in layers)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    multiples = jax.tree_util.tree_leaves_with_path(layer_decay.multiples(params, 0.5))
    found = {sharding.path_of(keys): multiple for keys, multiple in multiples}
    for path, layers in expected.items():
        wanted = 0.5 ** (last - np.array(layers, np.float32))
        np.testing.assert_array_equal(found[path].ravel(), wanted, err_msg=path)
    for (
        keys,
        leaf,
    ) in leaves:  # each broadcasts over its parameter, and is of one layer where that is not stacked
        rates = found[sharding.path_of(keys)]
        assert rates.dtype == np.float32 and np.broadcast_shapes(rates.shape, leaf.shape) == leaf.shape


def test_a_family_without_such_layers_is_named() -> None:
    params = {"patch": {"kernel": jnp.zeros((2, 3))}, "time": {"up": {"kernel": jnp.zeros((2, 3))}}}
    with pytest.raises(UserError, match=r"^optimizer\.layer_decay: knows .* not that of time/up/kernel;"):
        layer_decay.multiples(params, 0.5)


FINE_TUNING = [
    "optimizer.layer_decay=0.5", "optimizer.name=sgd", "optimizer.weight_decay_mode=l2",
    "optimizer.weight_decay=0.1", "model.depth=3", "model.width=128", "model.heads=2",
]  # fmt: skip


def moved(tiny: Tiny, *more: str) -> tuple[Any, Any]:
    """The parameters of a small ViT before and after two steps."""
    run = build.build(config.load(tiny["vit"], [*FINE_TUNING, *more]))
    current, step = state.init(run), state.make_step(run)
    before = jax.tree.map(np.asarray, current.params)
    rng = np.random.default_rng(0)
    shapes = run.batch(run.config.data.batch_size)
    for _ in range(2):
        images = rng.integers(0, 256, shapes["image"].shape, np.uint8)
        batch = {"image": jnp.asarray(images), "label": jnp.asarray(rng.integers(0, 10, 16), jnp.int32)}
        current, _ = step(current, batch, state.traced_hparams(run))
    return before, jax.tree.map(np.asarray, current.params)


def test_layers_learn_at_their_rates_on_any_mesh(tiny: Tiny) -> None:
    before, after = moved(tiny, "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
    single = moved(tiny)[1]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    plain = moved(tiny, "optimizer.layer_decay=1.0")[1]
    change = single["blocks"]["mlp"]["up"]["kernel"] - before["blocks"]["mlp"]["up"]["kernel"]
    whole = plain["blocks"]["mlp"]["up"]["kernel"] - before["blocks"]["mlp"]["up"]["kernel"]
    ratio = np.linalg.norm(change, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    np.testing.assert_allclose(ratio, [0.125, 0.25, 0.5], rtol=0.05)  # two steps: gradients differ a little
    np.testing.assert_allclose(
        np.linalg.norm(single["patch"]["kernel"] - before["patch"]["kernel"])
        / np.linalg.norm(plain["patch"]["kernel"] - before["patch"]["kernel"]),
        0.0625, rtol=0.05,
    )  # fmt: skip


@pytest.mark.slow  # tests/training/test_loop.py has it of another optimiser
def test_resumed_it_goes_on_to_the_same_bits(tmp_path: Path, tiny: Tiny, read_state: Any) -> None:
    whole = config.load(tiny["vit"], FINE_TUNING)
    loop.train(whole, tmp_path / "whole")
    loop.train(config.load(tiny["vit"], [*FINE_TUNING, "train.duration=4 steps"]), tmp_path / "resumed")
    loop.train(whole, tmp_path / "resumed")
    one, other = read_state(tmp_path / "whole", whole), read_state(tmp_path / "resumed", whole)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# Rules of parameters

# SGD for the patches, a tenth of the rate for the head, frozen positions, and no decay of vectors.
RULES = (
    ParamRule("^patch/", optimizer="sgd", weight_decay=0.2),
    ParamRule("^head/kernel$", lr_scale=0.1),
    ParamRule("^positions$", frozen=True),
    ParamRule(role="vector", weight_decay=0.0),
)


def test_each_parameter_is_updated_by_its_rule() -> None:
    """Three steps of clipping, warm-up and decay by hand: the norm is that of all gradients together."""
    options = Optimizer(
        learning_rate=0.1, weight_decay=0.3, grad_clip_norm=0.5, b1=0.8, b2=0.95, warmup="2 steps",
        param_rules=RULES,
    )  # fmt: skip
    paths = ("patch/kernel", "patch/bias", "head/kernel", "head/bias", "blocks/mlp/up/kernel", "positions")
    rng = np.random.default_rng(0)
    start = {path: rng.normal(size=(2, 3)).astype(np.float32) for path in paths}
    update, current = (
        optimizer.make_update(options, 2, 5),
        unflatten_dict(jax.tree.map(jnp.asarray, start), sep="/"),
    )
    kept = optimizer.transform(options).init(current)
    hparams = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.3)}
    expected = {path: x.astype(np.float64) for path, x in start.items()}
    first, second = ({path: np.zeros((2, 3)) for path in paths} for _ in range(2))
    for step in range(3):
        grads = {path: rng.normal(size=(2, 3)).astype(np.float32) for path in paths}
        current, kept, norm, step_rate = update(
            unflatten_dict(grads, sep="/"), kept, current, jnp.asarray(step), hparams
        )
        moving = [grad for path, grad in grads.items() if path != "positions"]
        whole = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in moving))
        np.testing.assert_allclose(norm, whole, rtol=1e-6)
        np.testing.assert_allclose(step_rate, 0.1 * min(step / 2, 1), rtol=1e-6)
        for path in paths[:-1]:
            grad, rate = grads[path] * min(1, 0.5 / whole), 0.1 * min(step / 2, 1)
            if path.startswith("patch/"):
                first[path] = grad + 0.8 * first[path]
                direction = first[path]
            else:
                first[path] = 0.8 * first[path] + 0.2 * grad
                second[path] = 0.95 * second[path] + 0.05 * grad**2
                mean, square = first[path] / (1 - 0.8 ** (step + 1)), second[path] / (1 - 0.95 ** (step + 1))
                direction = mean / (np.sqrt(square) + 1e-8)
            decay = {"patch/kernel": 0.2, "patch/bias": 0.2, "head/bias": 0.0}.get(path, 0.3)
            scale = 0.1 if path == "head/kernel" else 1.0
            expected[path] -= rate * scale * (direction + decay * expected[path])
    for path, found in named(current).items():
        np.testing.assert_allclose(found, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_sgd_of_some_with_l2_is_pytorchs() -> None:
    """The decay of both, in the gradient and before the momentum."""
    rules = (ParamRule("^slow$", optimizer="sgd", weight_decay=0.2),)
    options = Optimizer(learning_rate=0.1, weight_decay=0.3, weight_decay_mode="l2", param_rules=rules)
    start = {"slow": [1.0, -2.0, 3.0], "fast": [0.5, 0.1, -1.0]}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in start.items()}
    sgd = torch.optim.SGD([tensors["slow"]], lr=0.1, momentum=0.9, weight_decay=0.2)
    adam = torch.optim.Adam([tensors["fast"]], lr=0.1, weight_decay=0.3)
    update, params = optimizer.make_update(options, 0, 7), {name: jnp.asarray(x) for name, x in start.items()}
    kept = optimizer.transform(options).init(params)
    hparams = {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.3)}
    for i, grad in enumerate(GRADS):
        params, kept, *_ = update(
            {name: jnp.asarray(grad) for name in start}, kept, params, jnp.asarray(i), hparams
        )
        for tensor in tensors.values():
            tensor.grad = torch.from_numpy(grad.copy())
        sgd.step()
        adam.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=1e-4, err_msg=name)


def test_rules_without_another_optimizer_keep_the_state() -> None:
    params = {"patch": {"kernel": jnp.zeros((2, 3))}}
    plain = optimizer.transform(Optimizer()).init(params)
    same = optimizer.transform(Optimizer(param_rules=(ParamRule("^patch", optimizer="adamw"),))).init(params)
    assert jax.tree.structure(plain) == jax.tree.structure(same)


def test_rules_give_the_same_on_any_mesh(tiny: Tiny) -> None:
    rules = f"optimizer.param_rules={[dataclasses.asdict(rule) for rule in RULES]}"
    others = ("optimizer.name=adamw", "optimizer.weight_decay_mode=decoupled", "optimizer.layer_decay=1.0")
    before, after = moved(tiny, rules, *others, "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
    single = moved(tiny, rules, *others)[1]
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(after["positions"], before["positions"])
    assert (after["patch"]["kernel"] != before["patch"]["kernel"]).any()


def test_a_rule_that_selects_nothing_is_an_error(tiny: Tiny) -> None:
    rules = "optimizer.param_rules=[{'match': 'kernel$'}, {'match': '^block/', 'frozen': True}]"
    run = build.build(config.load(tiny["vit"], [rules]))
    message = r"^optimizer\.param_rules\[1\]\.match='\^block/': matches no parameter of the model, such as bl"
    with pytest.raises(UserError, match=message):
        state.make_step(run)
