"""transformers' ViLT against ours, its files both ways, and what its config says."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import ViltPredictionHeadTransform

from scaling.convert import rules
from scaling.convert.huggingface import vilt as format
from scaling.errors import UserError
from scaling.models import vilt
from tests.support import parity

WIDTH, WORDS, PATCHES = 24, 5, 9
SMALL: dict[str, Any] = dict(
    patch=4, width=WIDTH, depth=3, heads=3, vocabulary=30, length=7, num_classes=11, resolution=12
)
RNG = np.random.default_rng(0)


def small_config(**options: Any) -> ViltConfig:
    defaults = dict(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=3, intermediate_size=4 * WIDTH,
        image_size=12, patch_size=4, vocab_size=30, max_position_embeddings=7, num_labels=11,
        layer_norm_eps=1e-2,
    )  # fmt: skip
    return ViltConfig(**{**defaults, **options})


def reference_of(tasks: tuple[str, ...], **options: Any) -> Any:
    """In float64, with random weights large enough for the two forms of GELU to differ."""
    if tasks == ("nlvr2",):
        options |= dict(num_images=2, modality_type_vocab_size=3, num_labels=2)
    reference = getattr(transformers, format.ARCHITECTURES[tasks])(small_config(**options)).eval().double()
    parity.randomise(reference, 0.5)
    return reference


def examples(tasks: tuple[str, ...], height: int = 12, width: int = 12) -> dict[str, np.ndarray]:
    """Three images, or pairs of them, with texts of 5, 3 and 4 words."""
    images = (2,) if tasks == ("nlvr2",) else ()
    return {
        "x": RNG.standard_normal((3, *images, height, width, 3)).astype(np.float32),
        "text": RNG.integers(0, 30, (3, WORDS)).astype(np.int32),
        "mask": np.arange(WORDS) < np.array([[5], [3], [4]]),
    }


def theirs(inputs: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The reference's arguments for ours; every pixel counts."""
    pixels = torch.from_numpy(np.moveaxis(inputs["x"], -1, -3).copy()).to(dtype)
    return {
        "pixel_values": pixels,
        "pixel_mask": torch.ones((*pixels.shape[:-3], *pixels.shape[-2:]), dtype=torch.long),
        "input_ids": torch.from_numpy(inputs["text"]).long(),
        "attention_mask": torch.from_numpy(inputs["mask"]).long(),
    }


def only(model: vilt.ViLT, *names: str) -> Any:
    def call(variables: Any, **inputs: Any) -> dict[str, jax.Array]:
        out = model.apply(variables, **inputs)
        return {name: out[name] for name in names}

    return call


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers draws all patches in random order: here in reading order."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, **_: torch.arange(int(count)))


def features(reference: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = reference(**inputs)
    text, image = out.last_hidden_state.split([WORDS, out.last_hidden_state.shape[1] - WORDS], dim=1)
    return {"pooled": out.pooler_output, "text": text, "image": image}


def test_masked_words_answers_and_retrieval() -> None:
    """Three heads on one trunk, with another grid of patches than the table's: wider, and lower.

    The reference takes patches in another order, to which neither words nor the pooler are sensitive.
    """
    inputs, tasks = examples((), 8, 20), (("mlm",), ("vqa",), ("retrieval",))
    words, answers, retrieval = (reference_of(each) for each in tasks)
    answers.vilt = retrieval.vilt = words.vilt
    for p in answers.classifier[0].parameters():
        p.data *= 0.01  # so that the eps of the head's LayerNorm counts
    out = {
        task: model(**theirs(inputs)).logits
        for (task,), model in zip(tasks, (words, answers, retrieval), strict=True)
    }
    words.classifier, words.rank_output = answers.classifier, retrieval.rank_output  # into one file
    model = vilt.ViLT(**SMALL, epsilon=1e-2, tasks=tuple(out))
    tables = [format.table(vilt.ViLT(**SMALL, tasks=each)) for each in tasks]
    table = list({rule.name: rule for each in tables for rule in each}.values())
    parity.compare(model, table, inputs, words, out, only(model, *out))


def test_paired_reasoning() -> None:
    tasks = ("nlvr2",)
    reference, inputs = reference_of(tasks), examples(tasks)
    model = vilt.ViLT(**SMALL, epsilon=1e-2, tasks=tasks)
    out = {"nlvr2": reference(**theirs(inputs)).logits}
    parity.compare(model, format.table(model), inputs, reference, out, only(model, *out))


def test_features_and_the_heads_that_transformers_has_not(in_order: None) -> None:
    reference, inputs = reference_of(()), examples(())
    inputs["hidden"] = RNG.random((3, PATCHES)) < 0.4
    reference.itm = torch.nn.Linear(WIDTH, 2)
    reference.mpp = ViltPredictionHeadTransform(reference.config)
    reference.colours = torch.nn.Linear(WIDTH, 3 * 256)
    reference.mask_token = torch.nn.Parameter(torch.zeros(1, WIDTH))
    parity.randomise(reference.double(), 0.5)

    def hide(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:  # [B, D, 3, 3]
        hidden = torch.from_numpy(inputs["hidden"]).reshape(3, 1, 3, 3)
        return torch.where(hidden, reference.mask_token[0, :, None, None], out)

    reference.embeddings.patch_embeddings.register_forward_hook(hide)
    out = features(reference, theirs(inputs))
    colours = reference.colours(reference.mpp(out["image"][:, 1:]))
    red, green, blue = colours.split(256, dim=2)
    out |= {"itm": reference.itm(out["pooled"]), "mpp": torch.stack([red, green, blue], dim=2)}

    model = vilt.ViLT(**SMALL, epsilon=1e-2, tasks=("mpp", "itm"))
    table = [
        *format.table(vilt.ViLT(**SMALL)),
        *rules.tensor("mask_token", "image/mask_token"),
        *rules.linear("itm", "itm"),
        *rules.linear("mpp.dense", "mpp/dense"),
        *rules.norm("mpp.LayerNorm", "mpp/norm"),
        *rules.linear("colours", "mpp/decoder"),
    ]
    parity.compare(model, table, inputs, reference, out)


@pytest.mark.slow
def test_the_published_size(in_order: None) -> None:
    # Of 64 pixels a side instead of 384: all weights, fewer patches.
    reference = transformers.ViltForMaskedLM(ViltConfig()).eval()
    parity.randomise(reference, 0.05)
    for module in reference.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data += 1  # blocks then act on normalised features, not on small ones
    inputs = examples((), 64, 64)
    out = features(reference.vilt, theirs(inputs, torch.float32))
    out["mlm"] = reference.mlm_score(out["text"])
    model = vilt.make("B/32", tasks=("mlm",))
    parity.compare(model, format.table(model), inputs, reference, out)


@pytest.mark.parametrize("tasks", [*format.ARCHITECTURES], ids=str)
def test_there_and_back(tasks: Any, tmp_path: Path) -> None:
    reference = reference_of(tasks).float()
    model = vilt.ViLT(**SMALL, epsilon=1e-2, tasks=tasks)
    table, files = format.table(model), parity.saved(reference)
    again = rules.save(table, rules.load(table, files))
    assert again.keys() == files.keys()
    for name, tensor in files.items():
        assert again[name].dtype == tensor.dtype
        assert np.array_equal(again[name], tensor), name

    inputs = examples(tasks)
    folder = format.config(model, inputs)
    (tmp_path / "config.json").write_text(json.dumps(folder))
    save_file(again, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, report = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for parameter in opened.parameters():  # where a file's bytes lie decides how a processor sums
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = reference(**theirs(inputs, torch.float32))[0]
        torch.manual_seed(0)
        out = opened.eval()(**theirs(inputs, torch.float32))[0]
    assert torch.equal(out, expected)
    opened.save_pretrained(tmp_path / "again")
    for config in (folder, json.loads((tmp_path / "again/config.json").read_text())):
        said = format.fields(config)
        assert {name: getattr(model, name) for name in said} == said


def test_files_of_older_versions() -> None:
    reference = reference_of(("mlm",))
    saved, model = parity.saved(reference), vilt.ViLT(**SMALL, tasks=("mlm",))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **examples(("mlm",))))
    saved["vilt.embeddings.text_embeddings.position_ids"] = np.arange(SMALL["length"])[None]
    words = "vilt.embeddings.text_embeddings.word_embeddings.weight"
    saved |= {"mlm_score.decoder.weight": saved[words], "mlm_score.bias": saved["mlm_score.decoder.bias"]}
    assert rules.faults(format.table(model), saved, shapes, format.IGNORED) == []
    for name, of in (("mlm_score.decoder.weight", words), ("mlm_score.bias", "mlm_score.decoder.bias")):
        other = saved | {name: saved[name] + 1}  # of a layer that is not the table of words
        assert rules.faults(format.table(model), other, shapes, format.IGNORED) == [
            f"{name} differs from {of}, of which it must be a copy"
        ]


@pytest.mark.parametrize("tasks", [("itm",), ("mlm", "itm"), ("vqa", "retrieval")], ids=str)
def test_tasks_without_an_outside_form_are_named(tasks: Any) -> None:
    message = (
        f"tasks={','.join(tasks)}: transformers has ViLT for no task, or one of mlm, vqa, retrieval, nlvr2"
    )
    model = vilt.ViLT(**SMALL, tasks=tasks)
    with pytest.raises(UserError, match=message):
        format.table(model)
    with pytest.raises(UserError, match=message):
        format.config(model, examples(()))


def test_what_does_not_fit_the_format_is_named() -> None:
    model = vilt.ViLT(**{**SMALL, "resolution": (12, 16)})
    with pytest.raises(UserError, match=r"resolution=\(12, 16\): must be square"):
        format.config(model, examples(()))
    config = format.config(vilt.ViLT(**SMALL), examples(()))
    with pytest.raises(UserError, match="architectures=ViltForTokenClassification: must be one of ViltModel"):
        format.fields(config | {"architectures": ["ViltForTokenClassification"]})


def test_a_folder_for_another_resolution_is_resized() -> None:
    model, reference = vilt.ViLT(**SMALL, epsilon=1e-2, tasks=("vqa",)), reference_of(("vqa",))
    saved, wanted = parity.saved(reference), model.clone(resolution=(8, 20))
    assert format.source(wanted, saved, None) == model == format.source(model, saved, None)
    variables = rules.load(format.table(model), saved)
    made, said = vilt.resized(variables, model, wanted)
    assert said == ["image/positions: resized from 3x3 to 2x5 patches"]
    inputs = examples((), 8, 20)
    at_run_time = parity.jit(only(model, "vqa"))(variables, **inputs)
    again = parity.jit(only(wanted, "vqa"))(made, **inputs)
    np.testing.assert_allclose(again["vqa"], at_run_time["vqa"], rtol=1e-5, atol=1e-5)
