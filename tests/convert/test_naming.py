"""Checkpoints with the names that people have: taken, and said; or refused with the names side by side."""

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from scaling.cli import main
from scaling.convert import files, naming, transfer
from scaling.convert.huggingface import swin as huggingface_swin
from scaling.convert.huggingface import vivit as huggingface_vivit
from scaling.errors import UserError
from scaling.models.swin import Swin
from scaling.models.vivit import ViViT
from scaling.run import restore
from scaling.run.options import Config
from scaling.training import config
from tests.support import parity

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_vit.py")
WIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def cfg() -> Config:
    return config.load(TINY, ["model.epsilon=1e-12"])


def made(cls: Any = transformers.ViTForImageClassification, seed: int = 0) -> Any:
    """The tiny config's model for 8x8 digits, with random weights."""
    options = transformers.ViTConfig(**WIDE, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    model = cls(options)
    parity.randomise(model, seed=seed)
    return model


def expected(model: Any) -> dict[str, np.ndarray]:
    return parity.saved(model)


def imported(source: Path, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """The run's parameters by the names of a folder of transformers, and what was said."""
    said = transfer.import_run("huggingface", source, cfg(), folder, **options)
    trained = restore.restore_run(folder)
    weights = jax.device_get({"params": trained.weights["params"]})
    family = transfer.FORMATS["huggingface"].families["vit"]
    said = [line for line in said if not line.startswith("preprocessing")]
    return transfer.rules.save(family.table(trained.run.model), weights), said


def check(found: dict[str, np.ndarray], model: Any) -> None:
    wanted = expected(model)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_todays_names_in_memory_are_taken(tmp_path: Path) -> None:
    """What `torch.save(model.state_dict())` writes under transformers 5; its folders have older names."""
    model = made()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found, said = imported(tmp_path / "model.pt", tmp_path / "run")
    assert said == ["names: those of transformers 5 taken in 16 of 24"]
    check(found, model)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.module."]
)
def test_what_wrappers_put_before_names_goes(prefix: str, tmp_path: Path) -> None:
    model = made()
    wrapped = {f"{prefix}{name}": torch.from_numpy(t) for name, t in expected(model).items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "last.ckpt")
    found, said = imported(tmp_path / "last.ckpt", tmp_path / "run")
    assert said == ["names: wrappers' prefixes taken off in 24 of 24"]
    check(found, model)


def test_what_a_compiled_part_puts_within_names_goes(tmp_path: Path) -> None:
    model = made()
    within = {
        name.replace("vit.encoder.", "vit._orig_mod.encoder."): torch.from_numpy(t)
        for name, t in expected(model).items()
    }
    torch.save(within, tmp_path / "model.pt")
    found, said = imported(tmp_path / "model.pt", tmp_path / "run")
    assert said == ["names: wrappers' prefixes taken off in 16 of 24"]
    check(found, model)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averages_are_taken_beside_raw_weights(key: str, tmp_path: Path) -> None:
    raw, average = made(seed=0), made(seed=1)
    beside = "state_dict" if key == "state_dict_ema" else "model"
    torch.save({beside: raw.state_dict(), key: average.state_dict(), "epoch": 7}, tmp_path / "last.pth")
    found, said = imported(tmp_path / "last.pth", tmp_path / "run")
    assert said[0] == f"last.pth: {key} is taken, and not {beside}"
    check(found, average)


def test_what_an_average_keeps_beside_weights_is_none(tmp_path: Path) -> None:
    """Settings, and weights without names, are not taken for those that lie beside them, which is said."""
    model = made()
    average = {"decay": 0.999, "shadow_params": list(model.parameters())}
    torch.save({"ema": average, "state_dict": model.state_dict()}, tmp_path / "last.pth")
    found, said = imported(tmp_path / "last.pth", tmp_path / "run")
    assert said[0] == "last.pth: state_dict is taken, and not ema"
    check(found, model)


def test_torchs_averaged_model(tmp_path: Path) -> None:
    model = made()
    averaged = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    found, said = imported(tmp_path / "swa.pt", tmp_path / "run")
    assert said == [
        "names: wrappers' prefixes taken off in 24 of 24",
        "names: those of transformers 5 taken in 16 of 24",
    ]
    check(found, model)


def test_a_trainers_folder_with_what_training_needs_beside(tmp_path: Path) -> None:
    model, source = made(), tmp_path / "checkpoint-500"
    model.save_pretrained(source)
    (source / "model.safetensors").unlink()
    torch.save({n: torch.from_numpy(t) for n, t in expected(model).items()}, source / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        torch.save({"step": 3, "of": [1, 2]}, source / name)
    found, said = imported(source, tmp_path / "run")
    assert said == ["not read: optimizer.pt, rng_state_0.pth, scaler.pt, scheduler.pt, training_args.bin"]
    check(found, model)


def test_a_base_model_without_prefix_and_head(tmp_path: Path) -> None:
    """As google/vit-base-patch16-224-in21k is: no "vit." in names, a pooler that nobody reads, no head."""
    base = made(transformers.ViTModel)
    base.save_pretrained(tmp_path / "base")
    message = (
        r"missing classifier\.bias; missing classifier\.weight; the file has no head: give --reinit=head"
    )
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "base", tmp_path / "run")
    found, said = imported(tmp_path / "base", tmp_path / "run", reinit=["head"])
    assert said == [
        "names: 'vit.' added in 22 of 24",
        "not read: pooler.dense.bias, pooler.dense.weight",
        "head: starts afresh",
    ]
    wanted = {f"vit.{name}": t for name, t in expected(base).items() if not name.startswith("pooler.")}
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert found.keys() - wanted.keys() == {"classifier.weight", "classifier.bias"}


def test_the_import_in_vivits_recipe_works(tmp_path: Path) -> None:
    """The command of configs/vivit.py, on a folder of the class that it names."""
    base = transformers.ViTModel(transformers.ViTConfig(**WIDE, image_size=32, patch_size=16))
    base.save_pretrained(tmp_path / "vit-base-patch16-224-in21k")
    command = [
        "import", "--format=huggingface", f"--config={ROOT / 'configs/pretrained.py'}:vit/B/16",
        str(tmp_path / "vit-base-patch16-224-in21k"), f"--out={tmp_path / 'run'}", "--reinit=head",
    ]  # fmt: skip
    small = ["width=16", "depth=1", "heads=2", "resolution=32", "epsilon=1e-12"]
    assert main([*command, *(f"--config.model.{option}" for option in small)]) == 0
    recipe = (ROOT / "configs/vivit.py").read_text()
    assert "configs/pretrained.py:vit/B/16" in recipe and "--reinit=head" in recipe


@pytest.mark.parametrize("family", ["swin", "vivit"])
def test_todays_names_of_other_families(family: str) -> None:
    if family == "swin":
        reference = transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
            )
        )
        table = huggingface_swin.table(
            Swin(patch=2, width=8, depths=(2, 2), heads=(1, 2), window=4, num_classes=2)
        )
        module: Any = huggingface_swin
    else:
        reference = transformers.VivitForVideoClassification(
            transformers.VivitConfig(**WIDE, image_size=8, num_frames=4, tubelet_size=[2, 4, 4])
        )
        table = huggingface_vivit.table(
            ViViT(patch=4, tubelet=2, width=16, depth=1, heads=2, frames=4, resolution=8)
        )
        module = huggingface_vivit
    memory = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    found, said = naming.known(module.CONVERTER, table, memory)
    assert len(said) == 1 and said[0].startswith("names: those of transformers 5 taken")
    assert found.keys() >= parity.saved(reference).keys()


def test_other_names_are_shown_side_by_side(tmp_path: Path) -> None:
    """With a hundred faults of one kind, both kinds of names must be seen."""
    strange = {f"backbone.{name}": torch.from_numpy(t) for name, t in expected(made()).items()}
    torch.save(strange, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"does not fit the config: missing classifier\.bias; "
                                        r"unexpected backbone\.classifier\.bias; missing "):  # fmt: skip
        imported(tmp_path / "model.pt", tmp_path / "run")


def test_two_tensors_do_not_get_one_name(tmp_path: Path) -> None:
    plain = {name: torch.from_numpy(t) for name, t in expected(made()).items()}
    few = dict(list(plain.items())[:3])
    torch.save({**few, **{f"module.{name}": t for name, t in plain.items()}}, tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"wrappers' prefixes taken off: two tensors would have one name; give a file of one"
    ):
        imported(tmp_path / "model.pt", tmp_path / "run")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, tmp_path: Path) -> None:
    tensors = expected(made())
    tensors["vit.layernorm.weight"] = tensors["vit.layernorm.weight"].astype(np.float64)
    tensors["vit.layernorm.weight"][3] = bad
    torch.save({name: torch.from_numpy(t) for name, t in tensors.items()}, tmp_path / "model.pt")
    message = r"model\.pt: vit\.layernorm\.weight: 1 of 16 numbers are not finite; get the file again"
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "model.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_lies_beside_weights_is_not_taken_for_them(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        files.read_tensors(tmp_path)
