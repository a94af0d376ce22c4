"""Every field of every foreign config.json: none is imported with other outputs than its library's, unsaid.

A small model of each class is saved by its library. Then each field of its config.json is changed in turn,
and taken out, and fields that the library would also read are put in. What the library then computes with the
same tensors must be what the import computes, or the import refuses, or names the field.
"""

import copy
import functools
import importlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from scaling.convert import foreign, transfer
from scaling.errors import UserError
from scaling.run.options import Config
from tests.support import parity
from tests.support.foreign_cases import CASES, FOURS_OWN, OF_FOUR, Case

# What no saved folder has by itself, and a library reads.
ADDED: dict[str, dict[str, Any]] = {
    "huggingface": {"max_image_length": 3, "add_cross_attention": True, "pruned_heads": {"0": [1]},
                    "quantization_config": {"load_in_8bit": True}, "something_new": 1},
    "diffusers": {"something_new": 1, "interpolation_scale": 2.0},
}  # fmt: skip
# Fields that no function of the model is of: the scale of latents is the run's, not the network's.
BESIDE = {"vae": ("scaling_factor",)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity(logging.CRITICAL)
    yield
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_warning()


def others(key: str, value: Any) -> list[Any]:
    """Other values of a field, some of which its library takes."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, 1] if value > 0 else [value + 1, 3]
    if isinstance(value, float):
        return [2 * value + 0.1]
    if key == "_class_name":
        return ["Transformer2DModel", "UNet2DModel", "UNet2DConditionModel"]
    if key in ("hidden_act", "act_fn", "activation_fn", "dense_act_fn", "pooler_act"):
        return ["relu", "gelu", "gelu_new", "quick_gelu", "gelu-approximate", "silu"]
    if key == "feed_forward_proj":
        return ["gated-silu", "relu", "gelu"]
    if isinstance(value, str):
        return [f"{value}_other", "default", "ada_norm", "basic"]
    if isinstance(value, list):
        return [value[::-1], [each + 1 if isinstance(each, int) else each for each in value], value[:1]]
    if isinstance(value, dict):
        return [{}]
    return [1, True, "text"]


def changes(case: str, stated: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what was changed, the whole config) for every field, nested ones too."""
    for section in (None, *(k for k, v in stated.items() if k.endswith("_config") and isinstance(v, dict))):
        fields = stated if section is None else stated[section]
        added = ADDED[CASES[case].format]
        for key, value in [*fields.items(), *((k, None) for k in added if k not in fields)]:
            if key in BESIDE.get(case, ()):
                continue
            new = [added[key]] if key in added and key not in fields else [*others(key, value), ...]
            for each in new:
                whole = copy.deepcopy(stated)
                place = whole if section is None else whole[section]
                if each is ...:
                    del place[key]
                else:
                    place[key] = each
                yield f"{section or ''}.{key}={'absent' if each is ... else each}", whole


def theirs(case: Case, cls: Any, folder: Path) -> Any:
    """What the library computes from a folder; None where it cannot, or starts tensors afresh."""
    torch.manual_seed(0)
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        if any(
            report[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys") if key in report
        ):
            return None
        inputs = {name: torch.from_numpy(x) for name, x in case.inputs.items()}
        with torch.no_grad():
            out = jax.tree.map(lambda t: t.float().numpy(), case.call(model.eval().float(), inputs))
    except Exception:
        return None
    return out if all(np.isfinite(each).all() for each in jax.tree.leaves(out)) else None


def ours(case: Case, opened: transfer.Opened, folder: Path, known: dict[Any, Any]) -> Any:
    """What our model computes, which is `known` once it was computed: only config.json changes."""
    if opened.model not in known:
        call = parity.jit(functools.partial(opened.model.apply, method=case.method))
        known[opened.model] = case.read(call(opened.read(folder), **case.inputs))
    return known[opened.model]


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        np.shape(a) == np.shape(b) and np.abs(np.asarray(a) - b).max() <= 1e-4 * np.abs(b).max()
        for a, b in pairs
    )


def saved(name: str, folder: Path) -> type:
    """Saves the small model, with random weights that its format allows, and returns its class."""
    model = CASES[name].make()
    parity.randomise(model, 0.3)
    if name == "ldm":
        model.encoder_hid_proj.bias.data.zero_()
    if name == "dit":
        embedders = [block.norm1.emb for block in model.transformer_blocks]
        embedders[1].load_state_dict(embedders[0].state_dict())
    model.save_pretrained(folder)
    return type(model)


LONG = {
    "adm",
    "clip",
    "ldm",
    "resnet",
    "swin",
    "timesformer",
    "vae",
    "vilt",
    "vivit",
}  # to compile all the models of their fields


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in CASES]
)
def test_no_field_is_imported_with_other_outputs_unsaid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, run, known = CASES[name], tmp_path / name, {}, {}
    build = transfer._build

    def once(cfg: Config) -> Any:  # most of the time would be spent on building the same again
        key = json.dumps(cfg.raw)
        run[key] = run.get(key) or build(cfg)
        return run[key]

    monkeypatch.setattr(transfer, "_build", once)
    cls = saved(name, folder)
    stated = json.loads((folder / "config.json").read_text())
    cfg = case.config()
    opened = transfer.open_checkpoint(case.format, folder, cfg)
    assert same(ours(case, opened, folder, known), theirs(case, cls, folder))

    refused, silent = [], []
    for change, whole in changes(name, stated):
        (folder / "config.json").write_text(json.dumps(whole))
        try:
            opened = transfer.open_checkpoint(case.format, folder, cfg)
            found = ours(case, opened, folder, known)
        except UserError as e:
            assert "\n" not in str(e)
            refused.append(change)
            continue
        now = theirs(case, cls, folder)
        key = change.partition("=")[0].rpartition(".")[2]
        if now is not None and not same(found, now) and not any(key in line for line in opened.said):
            silent.append(change)
    assert silent == []
    assert len(refused) >= 10, refused
    assert not any(change.startswith((".dtype", ".transformers_version")) for change in refused)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format == "huggingface"])
def test_folders_of_transformers_4_open(name: str, tmp_path: Path) -> None:
    """With all fields that its versions wrote, in the towers too: transformers 5 heeds none of them."""
    case, cls = CASES[name], saved(name, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    towers = {key: {**OF_FOUR, **said[key]} for key in ("vision_config", "text_config") if key in said}
    (tmp_path / "config.json").write_text(
        json.dumps({**OF_FOUR, **said, **towers, **FOURS_OWN.get(name, {})})
    )
    opened = transfer.open_checkpoint(case.format, tmp_path, case.config())
    assert same(ours(case, opened, tmp_path, {}), theirs(case, cls, tmp_path))


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_the_librarys_own(name: str) -> None:
    """What a table takes for a field that is absent, and that it knows every field that there is."""
    case = CASES[name]
    module = importlib.import_module(f"scaling.convert.{case.format}.{case.family}")
    for table, cls in _tables(name, module):
        library = _defaults(cls)
        own = {key for key in library if key not in foreign.TRANSFORMERS | foreign.DIFFUSERS}
        assert own <= table.compared.keys() | table.only.keys() | table.free, own
        for key, value in {**table.only, **table.compared, **table.otherwise}.items():
            if key in library and key not in ("model_type", "architectures", "_class_name"):
                listed = list(value) if isinstance(value, tuple) else value
                skipped = key.endswith("_block_types") or key == "block_out_channels"
                follows = key in ("dense_act_fn", "is_gated_act")  # of feed_forward_proj
                assert skipped or follows or listed == library[key], key


def _tables(name: str, module: Any) -> list[tuple[foreign.Fields, Any]]:
    if name == "clip":
        towers = {"vision_config": transformers.CLIPVisionConfig, "text_config": transformers.CLIPTextConfig}
        return [(module.TOWERS[key], cls) for key, cls in towers.items()]
    if name in ("adm", "ldm"):
        return [(module.FIELDS[name], type(CASES[name].make()))]
    made = type(CASES[name].make())
    return [(module.FIELDS, getattr(made, "config_class", None) or made)]


def _defaults(cls: Any) -> dict[str, Any]:
    if issubclass(cls, transformers.PretrainedConfig):
        return {key: value for key, value in cls().to_dict().items() if key != "model_type"}
    parameters = inspect.signature(cls.__init__).parameters
    made = {key: p.default for key, p in parameters.items() if key != "self"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in made.items()}
