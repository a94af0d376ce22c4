"""Outside checkpoints as files: read without running anything that they hold, written whole or not at all."""

import argparse
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from scaling.errors import UserError
from scaling.files import read_json

Tensors = Mapping[str, np.ndarray]
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SHARD = 4 * 2**30  # bytes; beyond this an exported checkpoint is cut into several files
# Where training scripts put the weights: averages first.
WRAPPERS = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "params_ema"),
    *("state_dict", "model_state_dict", "model", "params"),
)
# What training leaves beside the weights, with the same endings: transformers' Trainer, accelerate.
BESIDE = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|sampler)[\w-]*\.")
DTYPES: dict[str, Any] = {  # safetensors' own loader for NumPy has no bfloat16
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(source: Path, said: list[str] | None = None) -> dict[str, np.ndarray]:
    """The tensors of a file (.safetensors, or PyTorch's .pt, .pth, .bin) or of a folder with such files.

    What is to be said of the choice among a file's contents is added to `said`.

    Raises: UserError where there are none, or they are truncated, foreign, or hold more than tensors.
    """
    said = [] if said is None else said
    files = _files(source, said)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        read = _torch(file, said) if file.suffix in TORCH else _safetensors(file)
        twice = sorted(tensors.keys() & read.keys())
        if twice:
            raise UserError(f"{source}: {twice[0]} is in {file.name} and in another file; give one of them")
        tensors |= read
    return tensors


def read_config(source: Path, name: str = "config.json") -> dict[str, Any] | None:
    """A folder's config.json, or another of its JSON files; None for a file, or a folder without one.

    Raises: UserError where it is not a JSON object.
    """
    path = source / name
    return _object(path) if path.is_file() else None


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path, advice="get the file again")
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; get the file again")
    return value


def _files(source: Path, said: list[str]) -> list[Path]:
    """The file, or the folder's: safetensors where it has any."""
    if source.is_file():
        if source.suffix not in (".safetensors", *TORCH):
            raise UserError(f"{source}: must end in .safetensors, {', '.join(TORCH)}")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    for endings in ((".safetensors",), TORCH):
        every = sorted(f for f in source.iterdir() if f.suffix in endings)
        found = [file for file in every if not BESIDE.match(file.name)]
        if found:
            left = [file.name for file in every if file not in found]
            if left:
                said.append(f"not read: {', '.join(left)}")
            for ending in endings:
                for index in source.glob(f"*{ending}.index.json"):
                    _check_shards(index, {file.name for file in found})
            return found
    raise UserError(f"{source}: holds no .safetensors, {', '.join(TORCH)}")


def _check_shards(index: Path, found: set[str]) -> None:
    """Every shard that an index file names must be there."""
    placed = _object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{index}: is not an index of shards; get the file again")
    missing = set(placed.values()) - found
    if missing:
        raise UserError(f"{index.parent}: the index names {', '.join(sorted(missing))}, which are missing")


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        found = deserialize(file.read_bytes())
        return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in found}
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{file}: cannot be read as safetensors ({_reason(e)}); get the file again") from None


def _torch(file: Path, said: list[str]) -> dict[str, np.ndarray]:
    """With `weights_only`: tensors and containers, and an error for anything that would run."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading it needs PyTorch; install torch, or give safetensors") from None
    if _is_program(file):
        raise UserError(
            f"{file}: is a TorchScript archive, which is a program; where you trust it, save "
            "model.state_dict() of model = torch.jit.load(FILE) first, and give that"
        )
    try:
        # Training scripts keep their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a foreign file fails in many ways, and none of them may go further
        raise UserError(
            f"{file}: cannot be read as tensors alone ({_reason(e)}); save its state_dict() as safetensors"
        ) from None
    wrapped = _unwrapped(file, loaded, said)
    if not isinstance(wrapped, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in wrapped.items()
    ):
        raise UserError(f"{file}: is not a state dict of tensors; save its state_dict() as safetensors")
    return {name: _array(file, name, tensor) for name, tensor in wrapped.items()}


def _unwrapped(file: Path, loaded: Any, said: list[str]) -> Any:
    """Returns the weights of a training script's checkpoint: their averages, where it has both."""
    there = [w for w in WRAPPERS if isinstance(loaded, dict) and _holds_tensors(loaded.get(w))]
    if not there:
        return loaded
    beside = [w for w in WRAPPERS if w in loaded and w != there[0]]
    if beside:
        said.append(f"{file.name}: {there[0]} is taken, and not {', '.join(beside)}")
    return _unwrapped(file, loaded[there[0]], said)


def _holds_tensors(part: Any) -> bool:
    """Whether it is a dict of tensors alone, or holds one: an average's settings are none."""
    import torch

    if not isinstance(part, dict) or not part:
        return False
    tensors = all(isinstance(value, torch.Tensor) for value in part.values())
    return tensors or any(_holds_tensors(part.get(name)) for name in WRAPPERS)


def _is_program(file: Path) -> bool:
    """Whether it is an archive by `torch.jit.save`: that keeps constants apart, and `torch.save` has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _reason(error: Exception) -> str:
    """In a line: what the file would call, or the first line of what PyTorch says."""
    said = str(error)
    called = re.search(r"GLOBAL (\S+)", said)
    if called:
        return f"it would call {called[1]}"
    return said.splitlines()[0][:160] if said else type(error).__name__


def _array(file: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    except (TypeError, RuntimeError) as e:  # sparse, quantised, or of a type that NumPy has not
        raise UserError(f"{file}: {name} cannot be read ({_reason(e)}); save it as a plain float32") from None


def write_folder(out: Path, name: str, tensors: Tensors, others: Mapping[str, bytes]) -> None:
    """A new folder with `name`.safetensors, in shards where it is large, and others; whole or not at all.

    Raises: UserError where `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"out={out}: exists; choose another folder, nothing is written over")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as e:
        raise UserError(f"out={out}: cannot be written ({e.strerror}); choose another folder") from None
    try:
        if tensors:
            _write_shards(made, name, tensors)
        for file, content in others.items():
            (made / file).write_bytes(content)
        made.chmod(0o755)
        made.replace(out)
    except (OSError, SafetensorError) as e:
        raise UserError(f"out={out}: cannot be written ({e}); free space, then try again") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_shards(folder: Path, name: str, tensors: Tensors) -> None:
    """As transformers and diffusers name them: one file, or NAME-00001-of-00002 with an index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = np.asarray(tensor, order="C")
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / f"{name}.safetensors", metadata={"format": "pt"})
        return
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{name}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
