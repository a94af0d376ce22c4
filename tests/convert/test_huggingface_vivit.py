"""transformers' ViViT against ours, its files both ways, and what its config says."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import VivitConfig, VivitForVideoClassification

from scaling.convert import rules
from scaling.convert.huggingface import vivit as format
from scaling.errors import UserError
from scaling.models import vivit
from tests.models import parity
from tests.models.video import check_closely

SMALL: dict[str, Any] = dict(
    patch=4, tubelet=2, width=24, depth=3, heads=3, num_classes=7, frames=6, resolution=(8, 12), epsilon=0.1
)
RNG = np.random.default_rng(0)


def reference_of() -> Any:
    """In float64, with large random weights."""
    config = VivitConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=[8, 12],
        num_frames=6, tubelet_size=[2, 4, 4], num_labels=7, layer_norm_eps=0.1,
    )  # fmt: skip
    reference = VivitForVideoClassification(config).eval().double()
    parity.randomise(reference, 0.5)
    return reference


def logits_of(reference: Any, x: np.ndarray) -> torch.Tensor:
    """Of x [B, T, H, W, C]."""
    dtype = next(reference.parameters()).dtype
    return reference(torch.from_numpy(x).to(dtype).permute(0, 1, 4, 2, 3)).logits


def test_forward_and_gradients() -> None:
    reference, model = reference_of(), vivit.ViViT(**SMALL)
    x = RNG.standard_normal((2, 6, 8, 12, 3)).astype(np.float32)
    out = logits_of(reference, x)
    variables = rules.load(format.table(model), parity.saved(reference))
    check_closely(model, variables, x, out.detach().numpy())
    parity.compare(model, format.table(model), {"x": x}, reference, out)


@pytest.mark.slow  # 89 million parameters, and the gradients of all
def test_the_full_size_on_few_small_frames() -> None:
    config = VivitConfig(num_frames=4, image_size=64, num_labels=400)
    reference = VivitForVideoClassification(config).eval()
    parity.randomise(reference, 0.2)
    model = vivit.make("B/16x2", frames=4, resolution=64)
    x = RNG.standard_normal((1, 4, 64, 64, 3)).astype(np.float32)
    parity.compare(model, format.table(model), {"x": x}, reference, logits_of(reference, x))


def test_files_go_over_and_back_bit_for_bit(tmp_path: Path) -> None:
    model = vivit.ViViT(**SMALL)
    x = RNG.standard_normal((2, 6, 8, 12, 3)).astype(np.float32)
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
    opened, said = VivitForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    expected = logits_of(reference, x).detach().numpy()
    np.testing.assert_array_equal(logits_of(opened.eval(), x).detach().numpy(), expected)


@pytest.mark.parametrize("changed", [{}, {"activation": "gelu", "resolution": 8, "tubelet": 3}], ids=str)
def test_what_a_config_says(changed: dict[str, Any]) -> None:
    model = vivit.ViViT(**{**SMALL, **changed})
    x = jax.ShapeDtypeStruct((1, 6, 8, 12, 3), np.float32)
    config = VivitConfig(**format.config(model, {"x": x})).to_dict()
    said = format.fields(config)
    assert said == {name: getattr(model, name) for name in said}
    assert {"heads", "tubelet", "activation", "epsilon"} <= set(said)


def test_what_the_format_has_not_is_named() -> None:
    x = jax.ShapeDtypeStruct((1, 6, 8, 12, 3), np.float32)
    for options, message in (
        ({"attention": "factorised-encoder"}, r"model\.attention=factorised-encoder: must be joint"),
        ({"embedding": "frame"}, r"model\.embedding=frame: must be tubelet"),
    ):
        model = vivit.ViViT(**SMALL, **options)
        with pytest.raises(UserError, match=message):
            format.table(model)
        with pytest.raises(UserError, match=message):
            format.config(model, {"x": x})
    with pytest.raises(UserError, match="hidden_act='relu': must be one of gelu_fast, gelu"):
        format.fields({**VivitConfig().to_dict(), "hidden_act": "relu"})


def test_frame_embedding_of_every_frame_is_a_tubelet_of_one() -> None:
    model = vivit.ViViT(**{**SMALL, "tubelet": 1}, embedding="frame")
    config = format.config(model, {"x": jax.ShapeDtypeStruct((1, 6, 8, 12, 3), np.float32)})
    assert config["tubelet_size"] == [1, 4, 4]


def test_a_folder_for_other_frames_and_another_resolution_is_resized() -> None:
    model, saved = vivit.ViViT(**SMALL), parity.saved(reference_of().float())
    config = format.config(model, {"x": jax.ShapeDtypeStruct((1, 6, 8, 12, 3), np.float32)})
    wanted = model.clone(frames=8, resolution=12)
    found = format.source(wanted, saved, config)
    assert found == model.clone(resolution=(8, 12))
    assert format.source(model, saved, config) == model
    assert format.source(wanted, saved, None) == wanted  # a table of 18 tokens could be of 2x3x3
    variables = rules.load(format.table(found), saved)
    made, said = vivit.resized(variables, found, wanted)
    assert said == ["positions: resized from 3x2x3 to 4x3x3 tokens"]
    x = RNG.standard_normal((2, 8, 12, 12, 3)).astype(np.float32)
    at_run_time = parity.jit(model.apply)(variables, x)
    np.testing.assert_allclose(parity.jit(wanted.apply)(made, x), at_run_time, rtol=1e-4, atol=1e-4)


def test_every_table_of_a_model_is_resized() -> None:
    small, x = {**SMALL, "heads": 4, "depth": 1}, RNG.standard_normal((2, 8, 12, 12, 3)).astype(np.float32)
    tables = {"factorised-encoder": 2, "factorised-self-attention": 1, "factorised-dot-product": 1}
    for attention, count in tables.items():
        model = vivit.ViViT(**small, attention=attention)  # type: ignore[arg-type]
        wanted = model.clone(frames=8, resolution=12)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: RNG.standard_normal(s.shape).astype(np.float32), shapes)
        made, said = vivit.resized(variables, model, wanted)
        assert len(said) == count
        new = jax.eval_shape(wanted.init, jax.random.key(0), x)
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, new)
        if count == 2:
            at_run_time = parity.jit(model.apply)(variables, x)
            np.testing.assert_allclose(parity.jit(wanted.apply)(made, x), at_run_time, rtol=1e-4, atol=1e-4)
