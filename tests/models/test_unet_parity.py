"""U-Nets against diffusers: forward, and the gradient of every parameter, with random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from scaling.convert import rules
from scaling.convert.diffusers import unet as diffusers_unet
from scaling.models import unet, unet_blocks
from tests.models import parity
from tests.models.test_unet import BASE, ONE, RNG, batch

# A stage that keeps its width, one without attention, and one whose blocks need no convolution to skip.
ADM = unet.UNet(**BASE, multipliers=(1, 2, 1), depth=1, attention=(4, 1), head_width=4)
LDM = unet.UNet(
    **BASE, kind="ldm", multipliers=(1, 2), depth=1, attention=(2,), heads=2, context=12, learn_sigma=False
)


def reference_of(model: unet.UNet, inputs: dict[str, Any], double: bool = True) -> Any:
    """diffusers' model of the same config, with random weights."""
    config = diffusers_unet.config(model, inputs)
    form = UNet2DModel if model.kind == "adm" else UNet2DConditionModel
    reference = form.from_config(config).eval()
    parity.randomise(reference.double() if double else reference)
    if model.kind == "ldm":
        reference.encoder_hid_proj.bias.requires_grad_(False).zero_()
    return reference


def forward(model: unet.UNet, reference: Any, inputs: dict[str, Any]) -> torch.Tensor:
    dtype = next(reference.parameters()).dtype
    x = torch.from_numpy(inputs["x"]).to(dtype).permute(0, 3, 1, 2)
    t, y = torch.from_numpy(inputs["t"]), torch.from_numpy(inputs["y"]).long()
    if model.kind == "ldm":
        y = torch.nn.functional.one_hot(y, model.num_classes + 1).to(dtype)[:, None]
    return reference(x, t, y).sample.permute(0, 2, 3, 1)


def test_adm_against_diffusers() -> None:
    inputs = batch()
    reference = reference_of(ADM, inputs)
    parity.compare(ADM, diffusers_unet.table(ADM), inputs, reference, forward(ADM, reference, inputs))


def silent(path: str) -> bool:
    """A softmax over one token is 1 whatever the query and the key: LDM's class is one token."""
    return any(f"{name}/" in path for name in ("norm_cross_attention", "cross_attention/query"))


def compare_conditional(model: unet.UNet, inputs: dict[str, Any], reference: Any) -> None:
    """`parity.compare`, but the parameters that are silent must have no gradient on both sides."""
    names = diffusers_unet.table(model)
    params = rules.load(names, parity.saved(reference))["params"]
    expected = forward(model, reference, inputs)
    slopes = rules.load(names, parity.backward(reference, expected))["params"]

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply({"params": params}, **inputs)
        return parity.scalar(out), out

    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    grads, out = jax.device_get(parity.jit(jax.grad(loss, has_aux=True))(params))
    theirs = expected.detach().numpy()
    assert np.abs(out - theirs).max() < 1e-4 * np.abs(theirs).max()
    floor = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(slopes))
    for (keys, g), e in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(slopes), strict=True):
        path = "/".join(key.key for key in keys)
        assert "/key/" in path or silent(path) == (np.abs(e).max() < 1e-6 * floor), path
        assert np.abs(g - e).max() < 1e-3 * max(np.abs(e).max(), floor), path


def test_ldm_against_diffusers() -> None:
    inputs = batch()
    compare_conditional(LDM, inputs, reference_of(LDM, inputs))


def test_a_spatial_transformer_with_a_longer_context_against_diffusers() -> None:
    """Small activations, so that the epsilons of its norms (1e-6 and 1e-5) show."""
    reference = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=4,
        cross_attention_dim=6, activation_fn="geglu",
    ).eval()  # fmt: skip
    parity.randomise(reference.double(), 0.5)
    for parameter in reference.proj_in.parameters():
        parameter.data *= 5e-3
    for layer in (reference.transformer_blocks[0].attn1, reference.transformer_blocks[0].attn2):
        layer.to_out[0].weight.data *= 1e-2  # keeps the later layer norms' inputs as small
        layer.to_out[0].bias.data *= 1e-2
    x = (1e-3 * RNG.standard_normal((2, 3, 2, 8))).astype(np.float32)
    context = RNG.standard_normal((2, 5, 6)).astype(np.float32)
    # contiguous: the backward pass of GroupNorm crashes on a permuted input that needs no gradient itself
    image = torch.from_numpy(x).double().permute(0, 3, 1, 2).contiguous()
    out = reference(image, torch.from_numpy(context).double(), return_dict=False)[0].permute(0, 2, 3, 1)

    model = unet_blocks.SpatialTransformer(heads=2, groups=4)
    names = [
        rules.Rule(
            rule.theirs.removeprefix("x."), tuple(p.replace("/y/", "/") for p in rule.ours), rule.shape
        )
        for rule in diffusers_unet._transformer("x", "y", heads=2)
    ]
    parity.compare(model, names, {"x": x, "context": context}, reference, out)


def test_an_upsampler_sees_the_image_at_low_resolution_resized_bilinearly() -> None:
    """diffusers' model takes the two images as one, and so does not know that it is an upsampler."""
    plain = ONE["adm"].clone(learn_sigma=False)
    inputs = batch()
    low = RNG.standard_normal((2, 2, 1, 3)).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(low).permute(0, 3, 1, 2), (8, 4), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    both = {**inputs, "x": np.concatenate([inputs["x"], resized.numpy()], axis=-1)}
    reference = reference_of(plain, both)  # 6 channels in and out
    out = forward(plain, reference, both)
    upsampler = ONE["adm"].clone(upsampler=True)  # 3 and 3 in, 6 out
    parity.compare(upsampler, diffusers_unet.table(plain), {**inputs, "low": low}, reference, out)


@pytest.mark.slow
def test_adm_64_at_full_size_against_diffusers() -> None:
    """All 296 M parameters, at 16x16 pixels."""
    model, inputs = unet.make("ADM-64"), batch(16, 16, size=1)
    reference = reference_of(model, inputs, double=False)
    parity.randomise(reference, 0.02)
    out = forward(model, reference, inputs)
    parity.compare(model, diffusers_unet.table(model), inputs, reference, out)
