"""transformers' TimeSformer and ViViT against ours, their files both ways, and what their configs say."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
)

from scaling.convert import rules
from scaling.convert.huggingface import timesformer as timesformer_format
from scaling.convert.huggingface import vivit as vivit_format
from scaling.errors import UserError
from scaling.models import timesformer, vivit
from tests.support import parity
from tests.support.video import check_closely

SMALL: dict[str, Any] = dict(patch=4, width=24, depth=3, heads=3, num_classes=7, epsilon=0.1)
THEIRS: dict[str, Any] = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, num_labels=7,
    layer_norm_eps=0.1,
)  # fmt: skip
RNG = np.random.default_rng(0)


class Family(NamedTuple):
    model: Any
    shape: tuple[int, ...]  # of a batch, [B, T, H, W, C]
    format: Any
    reference: Any
    config: Any
    sizes: dict[str, Any]  # of the model, in the config's names
    published: Any  # the full size, for four frames of 64 pixels


DIVIDED = Family(
    timesformer.TimeSformer(**SMALL, frames=4, resolution=12),
    (2, 4, 12, 12, 3),
    timesformer_format,
    TimesformerForVideoClassification,
    TimesformerConfig,
    dict(image_size=12, patch_size=4, num_frames=4),
    timesformer.make("B/16", frames=4, resolution=64),
)
JOINT = Family(
    vivit.ViViT(**SMALL, tubelet=2, frames=6, resolution=(8, 12)),
    (2, 6, 8, 12, 3),
    vivit_format,
    VivitForVideoClassification,
    VivitConfig,
    dict(image_size=[8, 12], num_frames=6, tubelet_size=[2, 4, 4]),
    vivit.make("B/16x2", frames=4, resolution=64),
)
FAMILIES = pytest.mark.parametrize("family", [DIVIDED, JOINT], ids=["timesformer", "vivit"])
X = jax.ShapeDtypeStruct(JOINT.shape, np.float32)


def reference_of(family: Family) -> Any:
    """In float64, with large random weights."""
    reference = family.reference(family.config(**THEIRS, **family.sizes)).eval().double()
    parity.randomise(reference, 0.5)
    return reference


def video(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def logits_of(reference: Any, x: np.ndarray) -> torch.Tensor:
    """Of x [B, T, H, W, C]."""
    dtype = next(reference.parameters()).dtype
    return reference(torch.from_numpy(x).to(dtype).permute(0, 1, 4, 2, 3)).logits


@FAMILIES
def test_forward_and_gradients(family: Family) -> None:
    reference, x = reference_of(family), video(*family.shape)
    out, table = logits_of(reference, x), family.format.table(family.model)
    check_closely(family.model, rules.load(table, parity.saved(reference)), x, out.detach().numpy())
    parity.compare(family.model, table, {"x": x}, reference, out)


@pytest.mark.slow  # 122 and 89 million parameters, and the gradients of all
@FAMILIES
def test_the_full_size_on_few_small_frames(family: Family) -> None:
    reference = family.reference(family.config(num_frames=4, image_size=64, num_labels=400)).eval()
    parity.randomise(reference, 0.2)
    x, table = video(1, 4, 64, 64, 3), family.format.table(family.published)
    parity.compare(family.published, table, {"x": x}, reference, logits_of(reference, x))


@FAMILIES
def test_files_go_over_and_back_bit_for_bit(family: Family, tmp_path: Path) -> None:
    model, x, table = family.model, video(*family.shape), family.format.table(family.model)
    reference = reference_of(family).float()
    tensors = parity.saved(reference)
    variables = rules.load(table, tensors)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    back = rules.save(table, variables)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)

    config = family.format.config(model, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(back, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, said = family.reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    expected = logits_of(reference, x).detach().numpy()
    np.testing.assert_array_equal(logits_of(opened.eval(), x).detach().numpy(), expected)


@pytest.mark.parametrize(
    ("family", "changed", "names"),
    [
        (DIVIDED, {}, {"heads", "patch", "epsilon"}),
        (JOINT, {}, {"heads", "tubelet", "activation", "epsilon"}),
        (
            JOINT,
            {"activation": "gelu", "resolution": 8, "tubelet": 3},
            {"heads", "tubelet", "activation", "epsilon"},
        ),
    ],
    ids=["timesformer", "vivit", "another vivit"],
)
def test_what_a_config_says(family: Family, changed: dict[str, Any], names: set[str]) -> None:
    model = family.model.clone(**changed)
    x = jax.ShapeDtypeStruct(family.shape, np.float32)
    config = family.config(**family.format.config(model, {"x": x})).to_dict()
    said = family.format.fields(config)
    assert said == {name: getattr(model, name) for name in said}
    assert names <= set(said)


@pytest.mark.parametrize(
    ("family", "name", "value", "message"),
    [
        (DIVIDED, "attention_type", "space_only", "attention_type='space_only': the family timesformer has"),
        (DIVIDED, "hidden_act", "relu", "hidden_act='relu': the family timesformer has"),
        (DIVIDED, "qkv_bias", False, "qkv_bias=False: the family timesformer has"),
        (JOINT, "hidden_act", "relu", "hidden_act='relu': must be one of gelu_fast, gelu"),
    ],
)
def test_a_config_that_no_model_has_is_named(family: Family, name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        family.format.fields({**family.config().to_dict(), name: value})


def test_a_timesformer_that_is_not_square_is_named() -> None:
    model = DIVIDED.model.clone(resolution=(12, 8))
    with pytest.raises(UserError, match=r"model\.resolution=\(12, 8\): must be square for this format"):
        timesformer_format.config(model, {"x": jax.ShapeDtypeStruct((1, 4, 12, 8, 3), np.float32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "factorised-encoder"}, r"model\.attention=factorised-encoder: must be joint"),
        ({"embedding": "frame"}, r"model\.embedding=frame: must be tubelet"),
    ],
)
def test_a_vivit_that_the_format_has_not_is_named(options: dict[str, Any], message: str) -> None:
    model = JOINT.model.clone(**options)
    with pytest.raises(UserError, match=message):
        vivit_format.table(model)
    with pytest.raises(UserError, match=message):
        vivit_format.config(model, {"x": X})


def test_frame_embedding_of_every_frame_is_a_tubelet_of_one() -> None:
    config = vivit_format.config(JOINT.model.clone(tubelet=1, embedding="frame"), {"x": X})
    assert config["tubelet_size"] == [1, 4, 4]


def same_when_resized(model: Any, wanted: Any, variables: Any, made: Any, shape: tuple[int, ...]) -> None:
    """Weights resized once give what the old ones give, resized at run time."""
    x = video(*shape)
    at_run_time = parity.jit(model.apply)(variables, x)
    np.testing.assert_allclose(parity.jit(wanted.apply)(made, x), at_run_time, rtol=1e-4, atol=1e-4)


def test_a_timesformer_for_other_frames_and_another_resolution_is_resized() -> None:
    model, saved = DIVIDED.model, parity.saved(reference_of(DIVIDED).float())
    wanted = model.clone(frames=6, resolution=(8, 16))
    assert timesformer_format.source(wanted, saved, None) == model
    assert timesformer_format.source(model, saved, None) == model
    variables = rules.load(timesformer_format.table(model), saved)
    made, said = timesformer.resized(variables, model, wanted)
    assert said == [
        "positions: resized from 3x3 to 2x4 patches",
        "temporal_positions: resized from 4 to 6 frames",
    ]
    same_when_resized(model, wanted, variables, made, (2, 6, 8, 16, 3))
    only_time = timesformer.resized(variables, model, model.clone(frames=6))[1]
    assert only_time == ["temporal_positions: resized from 4 to 6 frames"]


def test_a_vivit_for_other_frames_and_another_resolution_is_resized() -> None:
    model, saved = JOINT.model, parity.saved(reference_of(JOINT).float())
    config = vivit_format.config(model, {"x": X})
    wanted = model.clone(frames=8, resolution=12)
    found = vivit_format.source(wanted, saved, config)
    assert found == model
    assert vivit_format.source(model, saved, config) == model
    assert vivit_format.source(wanted, saved, None) == wanted  # a table of 18 tokens could be of 2x3x3
    variables = rules.load(vivit_format.table(found), saved)
    made, said = vivit.resized(variables, found, wanted)
    assert said == ["positions: resized from 3x2x3 to 4x3x3 tokens"]
    same_when_resized(model, wanted, variables, made, (2, 8, 12, 12, 3))


def test_every_table_of_a_vivit_is_resized() -> None:
    tables = {"factorised-encoder": 2, "factorised-self-attention": 1, "factorised-dot-product": 1}
    for attention, count in tables.items():
        model = JOINT.model.clone(heads=4, depth=1, attention=attention)
        wanted, x = model.clone(frames=8, resolution=12), video(2, 8, 12, 12, 3)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: RNG.standard_normal(s.shape).astype(np.float32), shapes)
        made, said = vivit.resized(variables, model, wanted)
        assert len(said) == count
        new = jax.eval_shape(wanted.init, jax.random.key(0), x)
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, new)
        if count == 2:
            same_when_resized(model, wanted, variables, made, x.shape)
