"""transformers' TimeSformer against ours, its files both ways, and what its config says."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import TimesformerConfig, TimesformerForVideoClassification

from scaling.convert import rules
from scaling.convert.huggingface import timesformer as format
from scaling.errors import UserError
from scaling.models import timesformer
from tests.models import parity
from tests.models.video import check_closely

SMALL: dict[str, Any] = dict(
    patch=4, width=24, depth=3, heads=3, num_classes=7, frames=4, resolution=12, epsilon=0.1
)
RNG = np.random.default_rng(0)


def reference_of() -> Any:
    """In float64, with large random weights."""
    config = TimesformerConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=12,
        patch_size=4, num_frames=4, num_labels=7, layer_norm_eps=0.1,
    )  # fmt: skip
    reference = TimesformerForVideoClassification(config).eval().double()
    parity.randomise(reference, 0.5)
    return reference


def logits_of(reference: Any, x: np.ndarray) -> torch.Tensor:
    """Of x [B, T, H, W, C]."""
    dtype = next(reference.parameters()).dtype
    return reference(torch.from_numpy(x).to(dtype).permute(0, 1, 4, 2, 3)).logits


def test_forward_and_gradients() -> None:
    reference, model = reference_of(), timesformer.TimeSformer(**SMALL)
    x = RNG.standard_normal((2, 4, 12, 12, 3)).astype(np.float32)
    out = logits_of(reference, x)
    variables = rules.load(format.table(model), parity.saved(reference))
    check_closely(model, variables, x, out.detach().numpy())
    parity.compare(model, format.table(model), {"x": x}, reference, out)


@pytest.mark.slow  # 122 million parameters, and the gradients of all
def test_the_full_size_on_few_small_frames() -> None:
    config = TimesformerConfig(num_frames=4, image_size=64, num_labels=400)
    reference = TimesformerForVideoClassification(config).eval()
    parity.randomise(reference, 0.2)
    model = timesformer.make("B/16", frames=4, resolution=64)
    x = RNG.standard_normal((1, 4, 64, 64, 3)).astype(np.float32)
    parity.compare(model, format.table(model), {"x": x}, reference, logits_of(reference, x))


def test_files_go_over_and_back_bit_for_bit(tmp_path: Path) -> None:
    model = timesformer.TimeSformer(**SMALL)
    x = RNG.standard_normal((2, 4, 12, 12, 3)).astype(np.float32)
    reference = reference_of().float()
    tensors = parity.saved(reference)
    variables = rules.load(format.table(model), tensors)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    back = rules.save(format.table(model), variables)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)

    config = format.config(model, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(back, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, said = TimesformerForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    expected = logits_of(reference, x).detach().numpy()
    np.testing.assert_array_equal(logits_of(opened.eval(), x).detach().numpy(), expected)


def test_what_a_config_says() -> None:
    model = timesformer.TimeSformer(**SMALL)
    x = jax.ShapeDtypeStruct((1, 4, 12, 12, 3), np.float32)
    config = TimesformerConfig(**format.config(model, {"x": x})).to_dict()
    said = format.fields(config)
    assert said == {name: getattr(model, name) for name in said}
    assert {"heads", "patch", "epsilon"} <= set(said)
    for name, value in (("attention_type", "space_only"), ("hidden_act", "relu"), ("qkv_bias", False)):
        with pytest.raises(UserError, match=f"{name}={value!r}: the family timesformer has"):
            format.fields({**config, name: value})


def test_a_model_that_is_not_square_is_named() -> None:
    model = timesformer.TimeSformer(**{**SMALL, "resolution": (12, 8)})
    with pytest.raises(UserError, match=r"model\.resolution=\(12, 8\): must be square for this format"):
        format.config(model, {"x": jax.ShapeDtypeStruct((1, 4, 12, 8, 3), np.float32)})


def test_a_folder_for_other_frames_and_another_resolution_is_resized() -> None:
    model, saved = timesformer.TimeSformer(**SMALL), parity.saved(reference_of().float())
    wanted = model.clone(frames=6, resolution=(8, 16))
    assert format.source(wanted, saved, None) == model == format.source(model, saved, None)
    variables = rules.load(format.table(model), saved)
    made, said = timesformer.resized(variables, model, wanted)
    assert said == [
        "positions: resized from 3x3 to 2x4 patches",
        "temporal_positions: resized from 4 to 6 frames",
    ]
    x = RNG.standard_normal((2, 6, 8, 16, 3)).astype(np.float32)
    at_run_time = parity.jit(model.apply)(variables, x)
    np.testing.assert_allclose(parity.jit(wanted.apply)(made, x), at_run_time, rtol=1e-4, atol=1e-4)
    only_time = timesformer.resized(variables, model, model.clone(frames=6))[1]
    assert only_time == ["temporal_positions: resized from 4 to 6 frames"]
