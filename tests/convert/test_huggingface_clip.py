"""CLIP in transformers' folders, over and back."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel

from scaling.convert import rules
from scaling.convert.huggingface import clip as huggingface_clip
from scaling.errors import UserError
from scaling.models import clip
from tests.support import parity

MODEL = clip.CLIP(
    patch=4, width=24, depth=2, heads=3, resolution=12, mlp_ratio=2.5, embed_dim=10, text_width=16,
    text_depth=3, text_heads=2, vocabulary=30, context=9, activation="gelu", epsilon=1e-4,
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
TEXT = np.random.default_rng(1).integers(0, 30, (2, 9)).astype(np.int32)
CONFIG = huggingface_clip.config(MODEL, {"x": jnp.asarray(X)})


@pytest.fixture
def saved() -> dict[str, np.ndarray]:
    reference = CLIPModel(CLIPConfig(**CONFIG))
    parity.randomise(reference, 0.5, seed=2)
    return parity.saved(reference)


def shapes() -> Any:
    return jax.eval_shape(MODEL.init, jax.random.key(0), X, TEXT)


def test_import_then_export_gives_the_same_tensors(saved: Any) -> None:
    table = huggingface_clip.table(MODEL)
    assert rules.faults(table, saved, shapes(), huggingface_clip.IGNORED) == []
    back = rules.save(table, rules.load(table, saved))
    assert set(back) == set(saved)
    for name, tensor in saved.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype), name
        assert np.array_equal(back[name], tensor), name


def test_an_exported_folder_opens_and_gives_the_same(saved: Any, tmp_path: Path) -> None:
    table = huggingface_clip.table(MODEL)
    variables = rules.load(table, saved)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(rules.save(table, variables), tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, report = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    theirs = opened(torch.from_numpy(TEXT).long(), torch.from_numpy(X).permute(0, 3, 1, 2))
    ours = parity.jit(MODEL.apply)(variables, X, TEXT)
    pairs = (ours.image, theirs.image_embeds), (ours.text, theirs.text_embeds)
    for a, b in (*pairs, (ours.scale, opened.logit_scale.exp())):
        exact = b.detach().numpy()
        assert np.abs(np.asarray(a) - exact).max() < 1e-4 * np.abs(exact).max()


def test_early_folders_hold_position_ids(saved: Any) -> None:
    table = huggingface_clip.table(MODEL)
    early = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
    tensors = saved | dict.fromkeys(early, np.arange(9)[None])
    assert rules.faults(table, tensors, shapes(), huggingface_clip.IGNORED) == []
    assert rules.faults(table, saved | {"position_id": X}, shapes(), huggingface_clip.IGNORED) == [
        "unexpected position_id"
    ]


def test_a_folder_says_what_the_model_is(tmp_path: Path) -> None:
    CLIPModel(CLIPConfig(**CONFIG)).save_pretrained(tmp_path)
    fields = huggingface_clip.fields(json.loads((tmp_path / "config.json").read_text()))
    assert fields == huggingface_clip.fields(CONFIG)
    assert clip.CLIP(**fields) == MODEL


def test_what_a_folder_leaves_out_is_transformers_default() -> None:
    model = clip.CLIP(**huggingface_clip.fields({"model_type": "clip"}))
    assert model == clip.make("ViT-B/32")
    early = {"vision_config": {"patch_size": 7}, "vision_config_dict": {"patch_size": 16}}
    assert huggingface_clip.fields(early | {"text_config_dict": None})["patch"] == 16


def test_an_early_folders_second_towers_go_first_with_their_defaults() -> None:
    """As transformers reads them: what only the first says, is not so."""
    stated = {"hidden_size": 256, "layer_norm_eps": 1e-3}
    early = {
        **{f"{tower}_config": dict(stated) for tower in ("vision", "text")},
        **{f"{tower}_config_dict": {"hidden_act": "gelu"} for tower in ("vision", "text")},
    }
    found = huggingface_clip.fields(early)
    theirs = CLIPConfig(**{name: dict(value) for name, value in early.items()})
    assert found["width"] == theirs.vision_config.hidden_size == 768
    assert found["text_width"] == theirs.text_config.hidden_size == 512
    assert found["epsilon"] == theirs.text_config.layer_norm_eps == 1e-5
    assert found["activation"] == theirs.text_config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("tower", "options", "message"),
    [
        ("text_config", {"hidden_act": "quick_gelu"}, "hidden_act: gelu for images and quick_gelu for texts"),
        ("text_config", {"layer_norm_eps": 1e-6}, "layer_norm_eps: 0.0001 for images and 1e-06 for texts"),
        ("vision_config", {"intermediate_size": 48}, "mlp_ratio: 2.0 for images and 2.5 for texts; must be"),
    ],
)
def test_what_differs_between_the_towers_is_refused(tower: str, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        huggingface_clip.fields(CONFIG | {tower: CONFIG[tower] | options})


def test_what_there_is_no_form_of_is_refused() -> None:
    towers = {t: CONFIG[t] | {"hidden_act": "relu"} for t in ("text_config", "vision_config")}
    with pytest.raises(UserError, match="hidden_act=relu: must be one of quick_gelu, gelu"):
        huggingface_clip.fields(CONFIG | towers)
    with pytest.raises(
        UserError, match="patch=None: transformers has no CLIP with a ResNet; its image tower"
    ):
        huggingface_clip.table(clip.make("RN50"))


def test_a_folder_for_another_resolution_is_resized(saved: Any) -> None:
    wanted = MODEL.clone(resolution=20)
    found = huggingface_clip.source(wanted, saved, CONFIG)
    assert found == MODEL == huggingface_clip.source(MODEL, saved, CONFIG)
    variables = rules.load(huggingface_clip.table(MODEL), saved)
    made, said = clip.resized(variables, MODEL, wanted)
    assert said == ["image/positions: resized from 3x3 to 5x5 patches"]
    x = np.random.default_rng(0).standard_normal((2, 20, 20, 3)).astype(np.float32)
    at_run_time = parity.jit(MODEL.apply)(variables, x, TEXT)
    for a, b in zip(
        *map(jax.tree.leaves, (parity.jit(wanted.apply)(made, x, TEXT), at_run_time)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
