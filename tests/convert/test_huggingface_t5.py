"""T5 v1.1's encoder in transformers' folders, over and back."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from scaling.convert import naming, rules
from scaling.convert.huggingface import t5 as huggingface_t5
from scaling.errors import UserError
from scaling.models import t5
from tests.support import parity

MODEL = t5.T5Encoder(
    width=24, depth=2, heads=3, head_width=4, mlp_width=40, vocabulary=30, buckets=8, max_distance=20,
    epsilon=1e-4,
)  # fmt: skip
TEXT = np.random.default_rng(0).integers(0, 30, (2, 12)).astype(np.int32)
MASK = np.arange(12)[None, :] < np.array([[12], [7]])


def shapes() -> Any:
    return jax.eval_shape(MODEL.init, jax.random.key(0), TEXT, MASK)


def reference(cls: Any = T5EncoderModel) -> Any:
    made = cls(T5Config(**huggingface_t5.config(MODEL, {}))).eval()
    parity.randomise(made)
    return made


def test_import_then_export_gives_the_same_tensors() -> None:
    table, saved = huggingface_t5.table(MODEL), parity.saved(reference())
    assert rules.faults(table, saved, shapes(), ()) == []
    back = rules.save(table, rules.load(table, saved))
    assert set(back) == set(saved)
    for name, tensor in saved.items():
        assert back[name].dtype == tensor.dtype
        assert np.array_equal(back[name], tensor), name


def test_an_exported_folder_opens_and_gives_the_same(tmp_path: Path) -> None:
    table = huggingface_t5.table(MODEL)
    variables = rules.load(table, parity.saved(reference()))
    (tmp_path / "config.json").write_text(json.dumps(huggingface_t5.config(MODEL, {})))
    save_file(rules.save(table, variables), tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, report = T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    mask = torch.from_numpy(MASK)
    theirs = opened(input_ids=torch.from_numpy(TEXT).long(), attention_mask=mask.long()).last_hidden_state
    theirs = torch.where(mask[:, :, None], theirs, 0).detach().numpy()
    ours = np.asarray(parity.jit(MODEL.apply)(variables, TEXT, MASK))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_encoder_of_a_whole_model_is_read() -> None:
    table, whole = huggingface_t5.table(MODEL), reference(T5ForConditionalGeneration)
    saved = parity.saved(whole)
    saved["encoder.embed_tokens.weight"] = saved["shared.weight"]  # as in the published files
    read, said = naming.known(huggingface_t5.CONVERTER, table, saved)
    assert len(said) == 1 and said[0].startswith("not read: decoder.block.0.layer.0.SelfAttention.k.weight")
    assert rules.faults(table, read, shapes(), ()) == []
    read["encoder.embed_tokens.weight"] = read["shared.weight"] + 1
    assert rules.faults(table, read, shapes(), ()) == [
        "encoder.embed_tokens.weight differs from shared.weight, of which it must be a copy"
    ]
    ours = parity.jit(MODEL.apply)(rules.load(table, saved), TEXT, MASK)
    mask = torch.from_numpy(MASK)
    theirs = whole.get_encoder()(input_ids=torch.from_numpy(TEXT).long(), attention_mask=mask.long())
    theirs = torch.where(mask[:, :, None], theirs.last_hidden_state, 0).detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_a_folder_says_what_the_model_is(tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path)
    fields = huggingface_t5.fields(json.loads((tmp_path / "config.json").read_text()))
    assert {name: getattr(MODEL, name) for name in fields} == fields
    assert fields == huggingface_t5.fields(huggingface_t5.config(MODEL, {}))
    assert t5.T5Encoder(**fields) == MODEL


def test_the_first_t5_is_refused() -> None:
    with pytest.raises(UserError, match=r"feed_forward_proj=relu: must be gated-gelu; only T5 v1\.1"):
        huggingface_t5.fields(T5Config().to_dict())
