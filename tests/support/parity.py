"""What the tests of parity share: a reference's weights and gradients through its own files, and bounds.

A reference is a PyTorch model with random weights. Its tensors are read from the folder that it saves, by the
tables of `scaling.convert`, so that these are tested too. Gradients go the same way: every step is linear.
"""

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file

from scaling.convert import rules
from tests.support.running import jit, named, scalar, weights

# Of the model's greatest gradient: what the bound on gradients cannot tell from 0.
SILENT = 1e-6


def randomise(model: torch.nn.Module, scale: float = 0.2, seed: int = 0, kept: float = 0.0) -> None:
    """Random parameters, and running statistics that are not the initial ones.

    Of what a parameter was, the share `kept` is added: with 1 a model is as it starts, but with biases and
    norms of some effect.
    """
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        noise = np.asarray(scale * rng.standard_normal(tuple(parameter.shape)))  # of shape () it is a float
        parameter.data = kept * parameter.data + torch.from_numpy(noise).to(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.data = torch.from_numpy(rng.standard_normal(tuple(buffer.shape))).to(buffer)
        if name.endswith("running_var"):
            buffer.data = torch.from_numpy(rng.uniform(0.5, 2.0, tuple(buffer.shape))).to(buffer)


def saved(model: Any) -> dict[str, np.ndarray]:
    """The float32 tensors that the model's own `save_pretrained` writes, in the names of its files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        merged = {name: t for file in files for name, t in load_file(file).items()}
    return {n: t.astype(np.float32) if t.dtype == np.float64 else t for n, t in merged.items()}


def backward(model: Any, outputs: Any) -> dict[str, np.ndarray]:
    """The gradients of `scalar(outputs)`, in the names of the model's files. The weights are lost."""
    total: Any = sum(
        (o * torch.from_numpy(weights(tuple(o.shape))).to(o)).sum() for o in jax.tree.leaves(outputs)
    )
    total.backward()
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    return saved(model)


def compare(
    model: Any,
    table: rules.Rules,
    inputs: Mapping[str, Any],
    reference: Any,
    outputs: Any,
    call: Callable[..., Any] | None = None,
    silent: Iterable[str] = (),
) -> None:
    """Holds a model with the reference's weights to its outputs and gradients, as `check` does.

    `outputs` are the reference's torch tensors in our layout, a tree like what `call(variables, **inputs)`
    returns; `call` is `model.apply` unless given.
    """
    variables = rules.load(table, saved(reference))
    expected = jax.tree.map(lambda o: o.detach().float().numpy(), outputs)
    slopes = backward(reference, outputs)
    for rule in table:  # the gradient of a tensor that stands in several places is their sum
        if rule.copies:
            slopes[rule.name] = slopes[rule.name] + sum(slopes[copy] for copy in rule.copies)
    slopes = rules.load(table, slopes)["params"]
    check(model, variables, inputs, expected, slopes, call, silent)


def check(
    model: Any,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    expected: Any,
    slopes: Any,
    call: Callable[..., Any] | None = None,
    silent: Iterable[str] = (),
) -> None:
    """Outputs within 1e-4 of their largest value, and gradients of every parameter within 1e-3.

    That is, of the larger of the tensor's greatest gradient and a thousandth of the model's greatest. So that
    this says something of every parameter, each must have a gradient in the reference. Without are the biases
    of keys, to which softmax is blind, and those named `silent`, each by some successive parts of its path:
    "cross_attention/query". These must have none but rounding.
    """
    call = model.apply if call is None else call
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), **inputs)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: Any) -> tuple[jax.Array, Any]:
        out = call({"params": params, **rest}, **inputs)
        return scalar(out), out

    grads, out = jax.device_get(jit(jax.grad(loss, has_aux=True))(variables["params"]))
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    grads, slopes = named(grads), named(slopes)
    assert grads.keys() == slopes.keys()
    greatest = max(np.abs(e).max() for e in slopes.values())
    for path, e in slopes.items():
        alone = any(f"/{name}/" in f"/{path}/" for name in ("key/bias", *silent))
        assert alone == (np.abs(e).max() <= SILENT * greatest), path
        assert np.abs(grads[path] - e).max() < 1e-3 * max(np.abs(e).max(), 1e-3 * greatest), path
