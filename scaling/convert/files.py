"""Outside checkpoints as files: read without running anything that they hold, written whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from scaling.errors import UserError

Tensors = Mapping[str, np.ndarray]
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SHARD = 4 * 2**30  # bytes; beyond this an exported checkpoint is cut into several files
WRAPPERS = ("ema", "state_dict", "model")  # where training scripts put the weights, the best first
DTYPES: dict[str, Any] = {  # safetensors' own loader for NumPy has no bfloat16
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(source: Path) -> dict[str, np.ndarray]:
    """The tensors of a file (.safetensors, or PyTorch's .pt, .pth, .bin) or of a folder with such files.

    Raises: UserError where there are none, or they are truncated, foreign, or hold more than tensors.
    """
    files = _files(source)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= _torch(file) if file.suffix in TORCH else _safetensors(file)
    return tensors


def read_config(source: Path) -> dict[str, Any] | None:
    """A folder's config.json; None for a file, or a folder without one.

    Raises: UserError where it is not a JSON object.
    """
    path = source / "config.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: is not JSON ({e}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; get the file again")
    return value


def _files(source: Path) -> list[Path]:
    """The file, or the folder's: safetensors where it has any."""
    if source.is_file():
        if source.suffix not in (".safetensors", *TORCH):
            raise UserError(f"{source}: must end in .safetensors, {', '.join(TORCH)}")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    for endings in ((".safetensors",), TORCH):
        found = sorted(f for f in source.iterdir() if f.suffix in endings)
        if found:
            _all_shards(source, found)
            return found
    raise UserError(f"{source}: holds no .safetensors, {', '.join(TORCH)}")


def _all_shards(folder: Path, found: list[Path]) -> None:
    """Every shard that an index file names must be there."""
    for index in folder.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as e:
            raise UserError(f"{index}: is not an index of shards ({e!r}); get the file again") from None
        missing = named - {file.name for file in found}
        if missing:
            raise UserError(f"{folder}: the index names {', '.join(sorted(missing))}, which are missing")


def _safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        found = deserialize(file.read_bytes())
        return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in found}
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{file}: cannot be read as safetensors ({reason}); get the file again") from None


def _torch(file: Path) -> dict[str, np.ndarray]:
    """With `weights_only`: tensors and containers, and an error for anything that would run."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading it needs PyTorch; install torch, or give safetensors") from None
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a foreign file fails in many ways, and none of them may go further
        reason = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
        raise UserError(
            f"{file}: cannot be read as tensors alone ({reason}); save its state_dict() as safetensors"
        ) from None
    wrapped = next(
        (loaded[w] for w in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(w), dict)), loaded
    )
    if not isinstance(wrapped, dict) or not all(isinstance(t, torch.Tensor) for t in wrapped.values()):
        raise UserError(f"{file}: is not a state dict of tensors; save its state_dict() as safetensors")
    return {name: _array(tensor) for name, tensor in wrapped.items()}


def _array(tensor: Any) -> np.ndarray:
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


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
