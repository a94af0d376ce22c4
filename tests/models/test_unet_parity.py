"""U-Nets against diffusers: forward, and the gradient of every parameter, with random weights."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from scaling.convert import rules
from scaling.convert.diffusers import unet as diffusers_unet
from scaling.models import unet, unet_blocks
from tests.support import parity
from tests.support.unets import BASE, ONE, batch

RNG = np.random.default_rng(0)

# A stage that keeps its width, one without attention, and one whose blocks need no convolution to skip.
ADM = unet.UNet(**BASE, multipliers=(1, 2, 1), depth=1, attention=(4, 1), head_width=4)
LDM = unet.UNet(
    **BASE, kind="ldm", multipliers=(1, 2), depth=1, attention=(2,), heads=2, context=12, learn_sigma=False
)


def reference_of(
    model: unet.UNet, inputs: dict[str, Any], scale: float = 0.2, kept: float = 0, double: bool = True
) -> Any:
    """diffusers' model of the same config, with random weights, as `parity.randomise` makes them."""
    torch.manual_seed(0)
    config = diffusers_unet.config(model, inputs)
    form = UNet2DModel if model.kind == "adm" else UNet2DConditionModel
    reference = form.from_config(config).eval()
    parity.randomise(reference.double() if double else reference, scale, kept=kept)
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


def compare(model: unet.UNet, inputs: dict[str, Any], reference: Any) -> None:
    # LDM's class is one token: a softmax over it is 1, whatever the query and the key.
    silent = ["norm_cross_attention", "cross_attention/query", "cross_attention/key"]
    out = forward(model, reference, inputs)
    names = diffusers_unet.table(model)
    parity.compare(model, names, inputs, reference, out, silent=silent if model.kind == "ldm" else ())


@pytest.mark.parametrize("model", [ADM, LDM], ids=["adm", "ldm"])
def test_small_models_against_diffusers(model: unet.UNet) -> None:
    inputs = batch()
    compare(model, inputs, reference_of(model, inputs))


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
        rules.ConversionRule(
            rule.name.removeprefix("x."), tuple(p.replace("/y/", "/") for p in rule.paths), rule.shape
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
@pytest.mark.parametrize("variant", ["ADM-64", "LDM-8"])  # 296 and 395 million parameters
def test_full_size_on_a_small_input_against_diffusers(variant: str) -> None:
    model = unet.make(variant)
    inputs = batch(16, 16, channels=unet.inputs(variant)["x"].shape[-1], size=1)
    compare(model, inputs, reference_of(model, inputs, 0.02, kept=1, double=False))
