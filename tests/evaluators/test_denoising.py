"""The denoising loss: the objective's own errors, the same for every batch size, seed and mesh."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling import data
from scaling.errors import UserError
from scaling.evaluators import DenoisingLoss
from scaling.objectives.base import scaled
from scaling.objectives.diffusion import Diffusion
from scaling.randomness import derive_key
from scaling.run import build, state
from scaling.training import config
from tests.support.measuring import measured

SUPPORT = Path(__file__).parents[1] / "support"


def built(**overrides: Any) -> build.Run:
    lines = [f"{key}={value}" for key, value in overrides.items()]
    return build.build(config.load(str(SUPPORT / "tiny_dit.py"), lines))


def weights_of(run: build.Run) -> dict[str, Any]:
    """Weights whose last layer is not zero, as DiT's is at first."""
    params = state.eval_weights(state.init(run))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return {
        "params": tree.unflatten(
            [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )
    }


@pytest.fixture(scope="module")
def run() -> build.Run:
    return built()


@pytest.fixture(scope="module")
def weights(run: build.Run) -> dict[str, Any]:
    return weights_of(run)


def test_it_is_the_mean_of_the_objectives_errors(run: build.Run, weights: dict[str, Any]) -> None:
    evaluator = DenoisingLoss(examples=40, times=3, batch_size=16)
    found = measured(evaluator, "fixed", run, weights)
    source = data.open_source(run.config.data, "test")
    columns = source.read(np.arange(40))
    objective = run.objective
    assert isinstance(objective, Diffusion)
    x = scaled(jnp.asarray(np.stack(columns["image"])))
    key = derive_key(jax.random.key(0), "denoise")
    losses = []
    for part, time in enumerate((1 / 6, 3 / 6, 5 / 6)):
        eps = jnp.stack(
            [
                jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), part), x.shape[1:])
                for i in range(40)
            ]
        )
        x_t = time * x + (1 - time) * eps
        output, _ = objective.predict(
            weights["params"], x_t, jnp.full(40, time), jnp.asarray(columns["label"])
        )
        losses.append(np.asarray(((output - (x - eps)) ** 2).mean((1, 2, 3)), np.float64))
    by_time = [loss.mean() for loss in losses]
    np.testing.assert_allclose([found[f"fixed_loss_t{part}"] for part in range(3)], by_time, rtol=1e-4)
    assert found["fixed_loss"] == pytest.approx(np.mean(by_time), rel=1e-4)
    means = np.mean(losses, 0)
    assert found["fixed_loss_se"] == pytest.approx(means.std(ddof=1) / 40**0.5, rel=1e-2)


def test_no_seed_batch_size_or_mesh_changes_it(run: build.Run, weights: dict[str, Any]) -> None:
    found = measured(DenoisingLoss(examples=50, times=2, batch_size=16), "fixed", run, weights)
    others = {
        "batches": measured(DenoisingLoss(examples=50, times=2, batch_size=64), "fixed", run, weights),
        "seed": measured(
            DenoisingLoss(examples=50, times=2, batch_size=16), "fixed", built(**{"train.seed": 5}), weights
        ),
        "mesh": measured(
            DenoisingLoss(examples=50, times=2, batch_size=16), "fixed", built(**{"mesh.fsdp": 4}), weights
        ),
    }
    for name, other in others.items():
        for metric, value in other.items():
            assert value == pytest.approx(found[metric], rel=1e-3 if metric.endswith("_se") else 1e-5), name


def test_more_examples_than_there_are_are_all(run: build.Run, weights: dict[str, Any]) -> None:
    count = len(data.open_source(run.config.data, "test"))
    exact = measured(DenoisingLoss(examples=count, times=1, batch_size=128), "fixed", run, weights)
    assert measured(DenoisingLoss(examples=10**6, times=1, batch_size=128), "fixed", run, weights) == exact
    assert measured(DenoisingLoss(examples=16, times=1, batch_size=128), "fixed", run, weights) != exact


@pytest.mark.parametrize(("path", "prediction"), [("ddpm-linear", "eps"), ("ddpm-cosine", "x")])
def test_other_paths_are_measured_at_their_own_positions(path: str, prediction: str) -> None:
    run = built(**{"objective.path": path, "objective.prediction": prediction})
    assert isinstance(run.objective, Diffusion)
    positions = run.objective.trained_path.quantiles(4)
    np.testing.assert_array_equal(positions, [125, 375, 625, 875])
    found = measured(DenoisingLoss(examples=16, times=4, batch_size=16), "fixed", run, weights_of(run))
    assert all(value > 0 for value in found.values())


def test_what_is_no_diffusion_is_refused() -> None:
    run = build.build(config.load(str(SUPPORT / "tiny_vit.py"), []))
    with pytest.raises(
        UserError, match=r"^evaluators\.fixed\.name='denoising_loss': measures diffusion, not "
    ):
        DenoisingLoss(batch_size=16).check("fixed", run)
