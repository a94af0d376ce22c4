"""Bad checkpoints of other libraries: files, tensors or a config.json with one thing wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.faults.bad_files import bad_jsons

Write = Callable[[Path], Any]

# kind -> config of the run that is exported and imported again, its flags, the format
FOREIGN: dict[str, tuple[str, list[str], str]] = {
    "vit": ("tiny_vit.py", ["--config.model.pool=token"], "huggingface"),
    "dit": ("tiny_dit.py", ["--config.model.frequency_shift=1"], "diffusers"),
    "timm": ("tiny_vit.py", ["--config.model.pool=token"], "timm"),
    "facebook": ("tiny_dit.py", [], "facebookresearch"),
}
NEW: dict[str, Any] = {"hidden_act": "quick_gelu", "activation_fn": "geglu", "model_type": "swin"}
UNSEEN = {"architectures", "num_channels", "id2label", "label2id", "torch_dtype"}  # change no output
HUGE: dict[str, Any] = {
    "list": [1],
    "null": None,
    "text": "x",
    "negative": -3,
    "huge": 10**30,
    "nan": float("nan"),
}


def foreign(kind: str) -> dict[str, Write]:
    """Returns what spoils a checkpoint's folder, by what is then wrong with it."""
    spoils: dict[str, Write] = {}
    for part in (0.0, 0.001, 0.01, 0.3, 0.99):
        spoils[f"cut at {part}"] = lambda folder, part=part: _truncate(_weights(folder), part)
    for name, change in {
        "missing": lambda tensors, key: tensors.pop(key),
        "renamed": lambda tensors, key: tensors.update({f"{key}x": tensors.pop(key)}),
        "reshaped": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)[:-1]}),
        "grown": lambda tensors, key: tensors.update({key: np.stack([tensors[key]] * 2)}),
        "integers": lambda tensors, key: tensors.update({key: tensors[key].astype(np.int32)}),
        "nan": lambda tensors, key: tensors.update({key: tensors[key] * np.nan}),
        "beside": lambda tensors, key: tensors.update({"beside": tensors[key]}),
        "empty": lambda tensors, key: tensors.update({key: tensors[key].reshape(-1)[:0]}),
    }.items():
        for place in (0, 5, -1):
            spoils[f"tensor {place} {name}"] = lambda folder, place=place, change=change: _spoil(
                folder, place, change
            )
    spoils["text"] = lambda folder: _weights(folder).write_bytes(b"hello")
    spoils["no weights"] = lambda folder: _weights(folder).unlink()
    spoils["a folder of that name"] = _folder_instead
    if kind in ("vit", "dit"):
        spoils |= {f"config {name}": write for name, write in bad_jsons("config.json").items()}
        spoils.pop("config NaN"), spoils.pop("config no keys")
        for field in FIELDS[kind]:
            for name, value in HUGE.items():
                spoils[f"field {field} {name}"] = lambda folder, field=field, value=value: _field(
                    folder, field, value
                )
            spoils[f"field {field} other"] = lambda folder, field=field: _field(
                folder, field, NEW.get(field, "other")
            )
        spoils["unknown field"] = lambda folder: _field(folder, "nothing_such", 3)
    return spoils


FIELDS = {
    "vit": (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "layer_norm_eps",
        "image_size",
        "patch_size",
    ),
    "dit": (
        "_class_name",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "in_channels",
        "sample_size",
        "patch_size",
        "num_embeds_ada_norm",
        "activation_fn",
        "norm_type",
        "norm_elementwise_affine",
        "norm_eps",
        "attention_bias",
    ),
}


def _weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _folder_instead(folder: Path) -> None:
    path = _weights(folder)
    path.unlink()
    path.mkdir()


def _truncate(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def _spoil(folder: Path, place: int, change: Callable[[dict[str, np.ndarray], str], Any]) -> None:
    tensors = load_file(_weights(folder))
    change(tensors, sorted(tensors)[place])
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, _weights(folder))


def _field(folder: Path, field: str, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
