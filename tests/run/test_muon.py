"""Muon: which parameters it takes, that its steps are orthogonal, and the same on any mesh."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from scaling.errors import UserError
from scaling.run import build, muon, optimizer
from scaling.run.options import Optimizer, ParamRule
from scaling.training import config, loop
from tests.test_house import ROOT

DIT = str(ROOT / "tests/support/tiny_dit.py")
RULE = {"match": "blocks/", "role": "matrix", "optimizer": "muon"}
BY_RULE = f"optimizer.param_rules=[{RULE}]"

TAKEN = {
    "tests/support/tiny_dit.py": [
        "blocks/attention/key/kernel", "blocks/attention/out/kernel", "blocks/attention/query/kernel",
        "blocks/attention/value/kernel", "blocks/mlp/down/kernel", "blocks/mlp/up/kernel",
        "blocks/modulation/kernel",
    ],
    "tests/support/tiny_vit.py": [
        "blocks/attention/key/kernel", "blocks/attention/out/kernel", "blocks/attention/query/kernel",
        "blocks/attention/value/kernel", "blocks/mlp/down/kernel", "blocks/mlp/up/kernel",
    ],
}  # fmt: skip


@pytest.mark.parametrize("file", TAKEN)
def test_it_takes_the_matrices_of_the_blocks_and_no_vectors(file: str) -> None:
    run = build.build(config.load(str(ROOT / file), [BY_RULE]))
    shapes = flatten_dict(run.variable_shapes["params"], sep="/")
    options = run.config.optimizer
    taken = sorted(path for path in shapes if optimizer.rule_of(path, options).optimizer == "muon")
    assert taken == TAKEN[file]
    for path in taken:
        axes = muon.dimensions(path)
        assert not isinstance(axes.reduction_axis, int) and not isinstance(axes.output_axis, int)
        assert (*axes.reduction_axis, *axes.output_axis) == tuple(range(1, len(shapes[path].shape)))
    assert muon.dimensions("blocks/attention/query/kernel") == ((1,), (2, 3))
    assert muon.dimensions("blocks/attention/out/kernel") == ((1, 2), (3,))


def test_each_layer_has_the_step_of_its_matrix_alone_and_the_size_of_adamws() -> None:
    rng = np.random.default_rng(0)
    grads = {
        "blocks/attention/query/kernel": rng.normal(size=(3, 12, 2, 4)),
        "blocks/mlp/down/kernel": rng.normal(size=(3, 24, 12)),
    }
    tree = unflatten_dict({path: jnp.asarray(grad, jnp.float32) for path, grad in grads.items()}, sep="/")
    ours = muon.scale_by_muon()
    with jax.numpy_dtype_promotion("standard"):
        found, _ = ours.update(tree, ours.init(tree))
    alone = optax.contrib.scale_by_muon()
    for path, steps in flatten_dict(found, sep="/").items():
        rows = 12 if "query" in path else 24
        for layer in range(3):
            matrix = jnp.asarray(grads[path][layer].reshape(rows, -1), jnp.float32)
            with jax.numpy_dtype_promotion("standard"):
                expected, _ = alone.update(matrix, alone.init(matrix), None)
            step = np.asarray(steps[layer]).reshape(rows, -1) / (0.2 * max(matrix.shape) ** 0.5)
            np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-5)
            singular = np.linalg.svd(step, compute_uv=False)
            assert (singular > 0.6).all() and (singular < 1.3).all()


def test_a_run_learns_by_it_the_same_on_any_mesh(tmp_path: Path) -> None:
    losses: dict[str, Any] = {}
    for name, mesh in {"one": [], "many": ["mesh.data=2", "mesh.fsdp=4"]}.items():
        cfg = config.load(DIT, [BY_RULE, "train.duration=6 steps", "optimizer.grad_clip_norm=None", *mesh])
        loop.train(cfg, tmp_path / name)
        events = [e for e in loop.read_events(tmp_path / name) if e["event"] == "train"]
        losses[name] = [e["values"]["loss"] for e in events]
    np.testing.assert_allclose(losses["one"], losses["many"], rtol=1e-4)
    assert losses["one"][-1] < losses["one"][0]


def test_it_is_for_matrices_by_a_rule() -> None:
    with pytest.raises(
        UserError, match=r"^name='muon': must be adamw or sgd; muon is for matrices, by a rule"
    ):
        Optimizer(name="muon")
    bad = "optimizer.param_rules=[{'match': 'head/', 'optimizer': 'muon'}]"
    run = build.build(config.load(str(ROOT / "tests/support/tiny_vit.py"), [bad]))
    with pytest.raises(
        UserError, match=r"^optimizer.param_rules\[0\].optimizer='muon': takes matrices, and head/bias"
    ):
        optimizer.check_rules(run.config.optimizer, run.variable_shapes["params"])
    assert ParamRule(role="matrix", optimizer="muon").optimizer == "muon"
