"""ResNet: parity with transformers in both modes, statistics over devices, and every way to run its depth."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from scaling import flops
from scaling.convert import rules
from scaling.convert.huggingface import resnet as huggingface_resnet
from scaling.errors import UserError
from scaling.models import resnet
from scaling.models.convolutions import Stage
from scaling.models.execution import EXECUTION, PLAIN
from scaling.parallel import sharding, tracing
from scaling.parallel.mesh import Mesh
from tests.support import parity
from tests.support.running import KEY, check_bfloat16, jit, largest_error, named, scalar

SMALL: dict[str, Any] = {"depths": (1, 1, 3, 1), "width": 4, "num_classes": 7}
BASIC = resnet.ResNet(**SMALL, bottleneck=False)


def images(batch: int = 3, height: int = 41, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, height, width, 3)).astype(np.float32)


# Against transformers


def reference(model: resnet.ResNet) -> Any:
    """transformers' network of the model's size in float64, with random weights and statistics."""
    widths = [model.width * (4 if model.bottleneck else 1) * 2**i for i in range(4)]
    config = ResNetConfig(
        embedding_size=model.width,
        hidden_sizes=widths,
        depths=list(model.depths),
        layer_type="bottleneck" if model.bottleneck else "basic",
        num_labels=model.num_classes,
    )
    made = ResNetForImageClassification(config).double()
    parity.randomise(made, 1.0)
    for module in made.modules():  # as large after every layer, and variances so small that epsilon counts
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data *= 0.1 * math.sqrt(2 / module.weight[0].numel())
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean *= 0.1
            module.running_var *= 0.01
    return made


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double().permute(0, 3, 1, 2)


def away_from_kinks(made: Any) -> None:
    """Moves the input of most ReLUs away from 0, where rounding decides whether a gradient passes.

    Of a full-size network's millions some are so close: PyTorch's own gradients in float32 then differ from
    those in float64 by several per cent.
    """
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data *= 0.5
            module.bias.data += 2 * torch.sign(module.bias.data)
        if isinstance(module, ResNetBasicLayer | ResNetBottleNeckLayer):
            module.layer[-1].normalization.weight.data *= 0.25


def compare(
    model: resnet.ResNet, x: np.ndarray, train: bool, gradients: bool = True, large: bool = False
) -> None:
    """Logits, what the running statistics are afterwards, and gradients."""
    theirs, names = reference(model).train(train), huggingface_resnet.table(model)
    if large:
        away_from_kinks(theirs)
    variables = rules.load(names, parity.saved(theirs))
    logits = theirs(channels_first(x)).logits
    expected = logits.detach().float().numpy()
    statistics = rules.load(names, parity.saved(theirs))["batch_stats"]
    changed = jax.tree.map(lambda a, b: largest_error(a, b) > 1e-2, statistics, variables["batch_stats"])
    assert set(jax.tree.leaves(changed)) == {train}

    def call(variables: Any, x: jax.Array) -> Any:
        logits, updated = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return logits, jax.lax.stop_gradient(updated["batch_stats"])

    if gradients:
        slopes = rules.load(names, parity.backward(theirs, logits))["params"]
        parity.check(model, variables, {"x": x}, (expected, statistics), slopes, call)
        return
    ours = jax.device_get(jit(call)(variables, x))
    for value, other in zip(jax.tree.leaves(ours), jax.tree.leaves((expected, statistics)), strict=True):
        assert largest_error(value, other) < 1e-4


@pytest.mark.parametrize(
    ("bottleneck", "train", "gradients"),
    [(False, True, True), (True, False, True), (True, True, False)],
    ids=["basic, training", "bottleneck, evaluation", "bottleneck, training"],
)
def test_against_transformers(bottleneck: bool, train: bool, gradients: bool) -> None:
    compare(resnet.ResNet(**SMALL, bottleneck=bottleneck), images(), train, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "train"), [("18", True), ("50", True), ("50", False)])
def test_full_size_against_transformers(variant: str, train: bool) -> None:
    compare(resnet.make(variant), images(2, 64, 64), train, large=True)


@pytest.fixture(scope="module")
def evaluated() -> Any:
    """transformers' BASIC, its variables, and what BASIC makes of them and the images."""
    theirs = reference(BASIC).eval()
    variables = rules.load(huggingface_resnet.table(BASIC), parity.saved(theirs))

    @jit
    def forward(variables: Any, x: jax.Array) -> Any:
        out = [
            BASIC.apply(variables, x, method=method) for method in ("feature_maps", "features", "__call__")
        ]
        return *out, BASIC.apply(variables, x, mutable=["batch_stats"])[1]

    return theirs, variables, forward


def test_maps_and_features_against_transformers(evaluated: Any) -> None:
    theirs, variables, forward = evaluated
    with torch.no_grad():
        out = theirs(channels_first(images()), output_hidden_states=True)
    expected = [h.permute(0, 2, 3, 1).float().numpy() for h in out.hidden_states[1:]]
    assert [h.shape[1:] for h in expected] == [(11, 13, 4), (6, 7, 8), (3, 4, 16), (2, 2, 32)]
    maps, features, logits, _ = jax.device_get(forward(variables, images()))
    for ours, h in zip(maps, expected, strict=True):
        assert (ours.shape, ours.dtype) == (h.shape, h.dtype)
        assert np.abs(ours - h).max() < 1e-4 * np.abs(h).max()
    assert largest_error(features, expected[-1].mean((1, 2))) < 1e-4
    assert largest_error(logits, out.logits.float().numpy()) < 1e-4


def test_evaluation_takes_each_example_alone_and_keeps_the_statistics(evaluated: Any) -> None:
    _, variables, forward = evaluated
    x = images()
    *_, logits, updated = jax.device_get(forward(variables, x))
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
    *_, others, _ = jax.device_get(forward(variables, np.stack([x[1], 9 * x[0], x[0]])))
    assert_allclose(others[[2, 0]], logits[:2], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_and_its_outputs_float32(evaluated: Any) -> None:
    _, variables, forward = evaluated
    maps, _, logits, _ = jax.device_get(forward(variables, images()))

    def maps_and_logits(variables: Any, x: jax.Array) -> Any:
        half = resnet.ResNet(**SMALL, bottleneck=False, dtype="bfloat16")
        return half.apply(variables, x, method="feature_maps"), half.apply(variables, x)

    out = jax.device_get(jit(maps_and_logits)(variables, images()))
    for value, expected in zip(jax.tree.leaves(out), [*maps, logits], strict=True):
        check_bfloat16(value, expected)


# Statistics and depth


def random_variables(model: nn.Module, x: np.ndarray, **options: Any) -> Any:
    """Kernels whose outputs are as large as their inputs; statistics and scales far from 0."""
    rng = np.random.default_rng(1)

    def one(path: Any, s: jax.ShapeDtypeStruct) -> jax.Array:
        value = rng.standard_normal(s.shape)
        if path[-1].key in ("var", "scale"):
            value = rng.uniform(0.5, 2, s.shape)
        if path[-1].key == "kernel":
            value *= math.sqrt(2 / math.prod(s.shape[-4:-1]))
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(
        one, jax.eval_shape(functools.partial(model.init, **options), KEY, x)
    )


def test_statistics_over_devices_are_those_of_the_whole_batch() -> None:
    x = images(8, 33, 33)
    x *= np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)  # no device's statistics are like another's
    variables = random_variables(BASIC, x)
    step = jit(functools.partial(BASIC.apply, train=True, mutable=["batch_stats"]))
    logits, updated = jax.device_get(step(variables, x))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"),)):
        shards = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        out = step(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), shards)
    assert out[0].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)
    assert largest_error(jax.device_get(out[1]), updated) < 1e-5
    assert largest_error(jax.device_get(out[0]), logits) < 1e-5


def stage(**form: Any) -> Stage:
    options: dict[str, Any] = {"remat": "none", "unroll": False} | form
    return Stage(functools.partial(resnet.Block, 6, bottleneck=False), depth=4, stride=2, **options)


@pytest.fixture(scope="module")
def scanned() -> Any:
    x = np.random.default_rng(2).standard_normal((3, 7, 6, 5)).astype(np.float32)
    variables = random_variables(stage(), x, train=True)
    return variables, x, gradients(stage(), variables, x)


def gradients(model: Stage, variables: Any, x: np.ndarray) -> Any:
    """Of a sum of what a training step gives; and what it gives."""

    def loss(params: Any, x: jax.Array) -> Any:
        rest = {"batch_stats": variables["batch_stats"]}
        out, updated = model.apply({"params": params, **rest}, x, train=True, mutable=["batch_stats"])
        return scalar(out), (out, updated)

    return jax.device_get(jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x))


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "full"}, {"remat": "dots", "unroll": True}], ids=str
)
def test_every_form_of_the_depth_gives_the_same(form: dict[str, Any], scanned: Any) -> None:
    variables, x, expected = scanned
    assert variables["batch_stats"]["blocks"]["norm1"]["var"].shape == (3, 6)
    for ours, theirs in zip(gradients(stage(**form), variables, x), expected, strict=True):
        assert largest_error(ours, theirs) < 1e-5


def test_on_cpus_there_is_no_loop() -> None:
    x = jnp.zeros((8, 7, 6, 5))
    variables = random_variables(stage(), x, train=True)
    forward = functools.partial(stage().apply, train=False)
    on_cpu = tracing.trace_on_mesh(sharding.make_mesh(Mesh(), jax.devices()[:1]), forward)
    loops = [jax.jit(f).lower(variables, x).as_text().count("while") for f in (forward, on_cpu)]
    assert loops[0] and not loops[1] and EXECUTION.get() is PLAIN


def test_remat_recomputes_the_blocks_and_dots_no_convolution() -> None:
    """Counted in the whole network: the stem and the head are not recomputed."""
    x, counts = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), {}
    for form in ({}, {"remat": "dots"}, {"remat": "full"}):
        model = resnet.make("18", **form)
        variables = jax.eval_shape(model.init, KEY, x)
        loss = lambda v, x, model=model: jnp.sum(model.apply(v, x))  # noqa: E731
        counts[str(form)] = flops.macs(jax.grad(loss), variables, x)
    plain = counts["{}"]
    blocks = flops.macs(resnet.make("18").apply, variables, x) - 7 * 7 * 3 * 64 * 112**2 - 512 * 1000
    assert counts == {
        "{}": plain,
        "{'remat': 'dots'}": plain,
        "{'remat': 'full'}": plain + blocks,
    }


def test_unroll_has_no_loop() -> None:
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    for unroll, expected in ((False, {1}), (True, {2, 3, 5})):
        model = resnet.make("34", unroll=unroll)
        jaxpr = jax.make_jaxpr(model.apply)(jax.eval_shape(model.init, KEY, x), x)
        loops = [e.params["unroll"] for e in jaxpr.eqns if e.primitive.name == "scan"]
        assert (len(loops), set(loops)) == (4, expected)


def test_forward_mode_agrees_with_reverse_mode(scanned: Any) -> None:
    variables, x, (slopes, _) = scanned
    rng = np.random.default_rng(3)
    primals = variables["params"], x
    tangents = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), primals)

    def total(params: Any, x: jax.Array) -> jax.Array:
        rest = {"batch_stats": variables["batch_stats"]}
        return scalar(stage().apply({"params": params, **rest}, x, True, mutable=["batch_stats"])[0])

    slope = jit(lambda p, t: jax.jvp(total, p, t))(primals, tangents)[1]
    terms = [
        np.sum(a * b, dtype=np.float64)
        for a, b in zip(*map(jax.tree.leaves, (slopes, tangents)), strict=True)
    ]
    assert float(slope) == pytest.approx(sum(terms), abs=1e-4 * max(map(abs, terms)))


@pytest.mark.parametrize("form", [{}, {"remat": "full"}, {"remat": "dots", "unroll": True}], ids=str)
def test_the_whole_network_can_be_differentiated_forwards(form: dict[str, Any]) -> None:
    model, x = resnet.make("18", **form), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    _, tangent = jax.eval_shape(lambda v, x: jax.jvp(model.apply, (v, x), (v, x)), variables, x)
    assert tangent.shape == (1, 1000)


# Start, options


def test_names_and_shapes_of_the_variables() -> None:
    variables = jax.eval_shape(resnet.make("50").init, KEY, images(1))
    kernels = {"stem": (7, 7, 3, 64), "head": (2048, 1000)}
    norms = {"norm_stem": (64,)}
    for i, (inputs, rest) in enumerate(zip((64, 256, 512, 1024), (2, 3, 5, 2), strict=True)):
        width, first, blocks = 64 * 2**i, f"stage{i + 1}/first", f"stage{i + 1}/blocks"
        kernels |= {
            f"{first}/conv1": (1, 1, inputs, width),
            f"{blocks}/conv1": (rest, 1, 1, 4 * width, width),
        }
        kernels |= {f"{first}/conv2": (3, 3, width, width), f"{blocks}/conv2": (rest, 3, 3, width, width)}
        kernels |= {f"{first}/conv3": (1, 1, width, 4 * width)}
        kernels |= {f"{blocks}/conv3": (rest, 1, 1, width, 4 * width)}
        kernels |= {f"{first}/shortcut": (1, 1, inputs, 4 * width)}
        norms |= {f"{first}/norm{j}": (width * (4 if j == 3 else 1),) for j in (1, 2, 3)}
        norms |= {f"{blocks}/norm{j}": (rest, width * (4 if j == 3 else 1)) for j in (1, 2, 3)}
        norms |= {f"{first}/norm_shortcut": (4 * width,)}
    expected = {f"{name}/kernel": shape for name, shape in kernels.items()} | {"head/bias": (1000,)}
    expected |= {f"{name}/{part}": shape for name, shape in norms.items() for part in ("scale", "bias")}
    assert {name: leaf.shape for name, leaf in named(variables["params"]).items()} == expected
    expected = {f"{name}/{part}": shape for name, shape in norms.items() for part in ("mean", "var")}
    assert {name: leaf.shape for name, leaf in named(variables["batch_stats"]).items()} == expected


@pytest.mark.parametrize(("bottleneck", "last"), [(False, "norm2"), (True, "norm3")])
def test_start_of_the_variables(bottleneck: bool, last: str) -> None:
    model = resnet.ResNet(depths=(1, 1, 3, 1), width=16, num_classes=500, bottleneck=bottleneck)

    def some() -> Any:  # the other stages start like this one, and are not compiled
        variables = model.init(KEY, images(1))
        chosen = {name: variables["params"][name] for name in ("stem", "stage3", "head")}
        return chosen, variables["batch_stats"]["stage3"]

    params, statistics = map(named, jax.device_get(jit(some)()))
    features = params["head/kernel"].shape[0]
    for leaf in (params.pop("head/kernel"), params.pop("head/bias")):  # uniform within 1 / sqrt(fan in)
        assert np.abs(leaf).max() == pytest.approx(features**-0.5, rel=0.02)
        assert leaf.std() == pytest.approx((3 * features) ** -0.5, rel=0.1)
    for name, leaf in params.items():
        if name.endswith("kernel"):  # N(0, 2 / fan out), in every layer its own
            expected = math.sqrt(2 / (leaf.shape[-4] * leaf.shape[-3] * leaf.shape[-1]))
            layers = leaf if "/blocks/" in name else leaf[None]
            for layer in layers:
                assert layer.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * layer.size)), name
                assert np.abs(layer).max() > 3 * expected  # not truncated
            assert len(layers) == 1 or np.abs(layers[0] - layers[1]).max() > expected
        else:
            assert np.all(leaf == (0 if name.endswith(("bias", f"{last}/scale")) else 1)), name
    assert all(np.all(leaf == name.endswith("var")) for name, leaf in statistics.items())


@pytest.mark.parametrize("sides", [(224, 224), (256, 192), (65, 97), (7, 1)], ids=str)
def test_maps_of_any_input_size(sides: tuple[int, int]) -> None:
    x, model = jax.ShapeDtypeStruct((2, *sides, 3), jnp.float32), resnet.make("50")
    variables = jax.eval_shape(model.init, KEY, x)
    maps = jax.eval_shape(functools.partial(model.apply, method="feature_maps"), variables, x)
    expected = [(2, *(math.ceil(s / 2 ** (2 + i)) for s in sides), 256 * 2**i) for i in range(4)]
    assert [each.shape for each in maps] == expected


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("51", {}, r"variant='51': must be one of 18, 34, 50, 101, 152, A, F, P, N"),
        ("50", {"depth": 3}, r"model\.depth: no such key; did you mean model\.depths\?"),
        ("50", {"depths": (3, 4, "6")}, r"model\.depths\[2\]='6': must be an integer"),
        ("50", {"stem": "5x5"}, r"model\.stem='5x5': must be one of 7x7, 3x3"),
        ("50", {"width": 0}, r"model\.width=0: must be positive"),
        ("50", {"bottleneck": "yes"}, r"model\.bottleneck='yes': must be True or False"),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resnet.make(variant, **options)


def test_a_small_stem_keeps_small_images_whole() -> None:
    model = resnet.make("A")
    variables = jax.eval_shape(functools.partial(model.init, train=False), KEY, **resnet.inputs("A"))
    assert variables["params"]["stem"]["kernel"].shape == (3, 3, 1, 4)
    maps = jax.eval_shape(
        functools.partial(model.apply, method="feature_maps"), variables, **resnet.inputs("A")
    )
    assert [m.shape for m in maps] == [(1, 28, 28, 4), (1, 14, 14, 8), (1, 7, 7, 16)]


def test_a_stage_without_blocks_is_found_without_compiling() -> None:
    model = resnet.make("50", depths=(3, 0, 6, 3))
    with pytest.raises(UserError, match=r"depths=\(3, 0, 6, 3\): every stage must have at least 1 block"):
        jax.eval_shape(model.init, KEY, **resnet.inputs("50"))


def test_unknown_variants_have_no_inputs() -> None:
    with pytest.raises(UserError, match=r"variant='B/16': must be one of"):
        resnet.inputs("B/16")
