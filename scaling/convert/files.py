"""Foreign checkpoints as files: reading one runs no code from it, and writing one is all or nothing."""

import argparse
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from scaling.errors import UserError
from scaling.files import read_json, sha256

Tensors = Mapping[str, np.ndarray]
TORCH = (".pt", ".pth", ".bin", ".ckpt")
SUMS = "SHA256SUMS"
SHARD = 4 * 2**30  # maximum bytes of tensors per exported file; larger checkpoints are split
# Keys under which training scripts put the weights, averages first.
WRAPPERS = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "params_ema"),
    *("state_dict", "model_state_dict", "model", "params"),
)
# Files that training (transformers' Trainer, accelerate) leaves beside the weights, with the same endings.
BESIDE = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|sampler)[\w-]*\.")
DTYPES: dict[str, Any] = {  # safetensors' own loader for NumPy has no bfloat16
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(source: Path, notes: list[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the tensors of a file (.safetensors, or PyTorch's .pt, .pth, .bin) or of a folder of such files.

    A line for each choice among a file's contents is appended to `notes`.

    Raises:
        UserError: if there is no such file, or one is truncated, of another kind, or holds more than tensors.
    """
    notes = [] if notes is None else notes
    files = _weight_files(source, notes)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        loaded = _read_torch(file, notes) if file.suffix in TORCH else _read_safetensors(file)
        twice = sorted(tensors.keys() & loaded.keys())
        if twice:
            raise UserError(f"{source}: {twice[0]} is in {file.name} and in another file; give one of them")
        tensors |= loaded
    return tensors


def read_config(source: Path, name: str = "config.json") -> dict[str, Any] | None:
    """Reads a folder's config.json, or another of its JSON files; None for a file, or a folder without one.

    Raises:
        UserError: if the file cannot be read, or is not a JSON object.
    """
    return read_json(source / name, advice="get the file again")


def _weight_files(source: Path, notes: list[str]) -> list[Path]:
    """Returns the file itself, or the folder's weight files: its safetensors where it has any."""
    if source.is_file():
        if source.suffix not in (".safetensors", *TORCH):
            raise UserError(f"{source}: must end in .safetensors, {', '.join(TORCH)}")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    for endings in ((".safetensors",), TORCH):
        candidates = sorted(f for f in source.iterdir() if f.suffix in endings)
        weights = [file for file in candidates if not BESIDE.match(file.name)]
        if weights:
            skipped = [file.name for file in candidates if file not in weights]
            if skipped:
                notes.append(f"not read: {', '.join(skipped)}")
            for ending in endings:
                for index in source.glob(f"*{ending}.index.json"):
                    _check_shards(index, {file.name for file in weights})
            return weights
    raise UserError(f"{source}: holds no .safetensors, {', '.join(TORCH)}")


def _check_shards(index: Path, present: set[str]) -> None:
    """Checks that every shard that an index file names is present."""
    weight_map = (read_json(index, advice="get the file again") or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: is not an index of shards; get the file again")
    missing = set(weight_map.values()) - present
    if missing:
        raise UserError(f"{index.parent}: the index names {', '.join(sorted(missing))}, which are missing")


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        entries = deserialize(file.read_bytes())
        return {name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]) for name, t in entries}
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{file}: cannot be read as safetensors ({reason(e)}); get the file again") from None


def _read_torch(file: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """Reads with `weights_only`: tensors and containers load, anything that would run code is an error."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading it needs PyTorch; install torch, or give safetensors") from None
    _require_whole_weights(file)
    try:
        # Training scripts keep their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a file from elsewhere fails in many ways, and each must become a UserError
        raise UserError(
            f"{file}: cannot be read as tensors alone ({reason(e)}); save its state_dict() as safetensors"
        ) from None
    weights = _unwrap(file, loaded, notes)
    if not isinstance(weights, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in weights.items()
    ):
        raise UserError(f"{file}: is not a state dict of tensors; save its state_dict() as safetensors")
    return {name: _to_array(file, name, tensor) for name, tensor in weights.items()}


def _unwrap(file: Path, loaded: Any, notes: list[str]) -> Any:
    """Returns the weights of a training script's checkpoint: their averages, where it has both."""
    wrappers = [w for w in WRAPPERS if isinstance(loaded, dict) and _holds_tensors(loaded.get(w))]
    if not wrappers:
        return loaded
    passed_over = [w for w in WRAPPERS if w in loaded and w != wrappers[0]]
    if passed_over:
        notes.append(f"{file.name}: {wrappers[0]} is taken, and not {', '.join(passed_over)}")
    return _unwrap(file, loaded[wrappers[0]], notes)


def _holds_tensors(part: Any) -> bool:
    """Returns whether `part` is a dict of tensors alone, or holds one; an average's settings are none."""
    import torch

    if not isinstance(part, dict) or not part:
        return False
    tensors = all(isinstance(value, torch.Tensor) for value in part.values())
    return tensors or any(_holds_tensors(part.get(name)) for name in WRAPPERS)


def _require_whole_weights(file: Path) -> None:
    """Checks that an archive is no program and is as it was written, since PyTorch compares no checksum.

    A program is what `torch.jit.save` writes: it stores constants apart, which `torch.save` does not.

    Raises:
        UserError: if it is a program, or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("/constants.pkl") for member in members):
                raise UserError(
                    f"{file}: is a TorchScript archive, which is a program; where you trust it, save "
                    "model.state_dict() of model = torch.jit.load(FILE) first, and give that"
                )
            for member in members:
                if member.CRC:  # 0 is that of none (`torch.serialization.set_crc32_options`)
                    with archive.open(member) as content:
                        while content.read(2**20):
                            pass
    except UserError:
        raise
    except Exception as e:  # zipfile fails in many ways
        if zipfile.is_zipfile(file):  # what PyTorch before 1.6 wrote is none
            raise UserError(f"{file}: is damaged ({reason(e)}); get the file again") from None


def reason(error: Exception) -> str:
    """Returns one line: the function that the file would call, or the first line of PyTorch's message."""
    message = str(error)
    called = re.search(r"GLOBAL (\S+)", message)
    if called:
        return f"it would call {called[1]}"
    return message.splitlines()[0][:160] if message else type(error).__name__


def _to_array(file: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    except (TypeError, RuntimeError) as e:  # sparse, quantised, or of a type that NumPy lacks
        raise UserError(f"{file}: {name} cannot be read ({reason(e)}); save it as a plain float32") from None


def write_folder(out: Path, name: str, tensors: Tensors, others: Mapping[str, bytes]) -> None:
    """Writes a new folder with `name`.safetensors, in shards where it is large, and the files `others`.

    The folder appears complete or not at all. `SHA256SUMS` in it is for `sha256sum --check` and for imports.

    Raises:
        UserError: if `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"out={out}: exists; choose another folder, nothing is written over")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = out.with_name(f".{out.name}.{os.getpid()}")
        staging.mkdir()
    except OSError as e:
        raise UserError(f"out={out}: cannot be written ({e.strerror}); choose another folder") from None
    try:
        if tensors:
            _write_shards(staging, name, tensors)
        for file, content in others.items():
            (staging / file).write_bytes(content)
        written = sorted(path.name for path in staging.iterdir())
        sums = staging / SUMS
        sums.write_text("".join(f"{sha256(staging / file)}  {file}\n" for file in written))
        for file in written:
            shutil.copymode(sums, staging / file)  # safetensors' are for their owner alone
        staging.replace(out)
    except (OSError, SafetensorError) as e:
        raise UserError(f"out={out}: cannot be written ({e}); free space, then try again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_unchanged(source: Path) -> None:
    """Checks a folder's files, or one of them, against the folder's `SHA256SUMS`, if it has that.

    Raises:
        UserError: if a file has changed, or cannot be read.
    """
    folder = source if source.is_dir() else source.parent
    try:
        sums = (folder / SUMS).read_bytes().decode(errors="replace") if (folder / SUMS).is_file() else ""
        for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", sums, re.MULTILINE):
            file = folder / name
            if source in (folder, file) and file.is_file() and sha256(file) != digest:
                raise UserError(
                    f"{file}: is not what {SUMS} lists; copy it again, or delete {SUMS} if you changed it"
                )
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); give access to it") from None


def _write_shards(folder: Path, name: str, tensors: Tensors) -> None:
    """Writes the files that transformers and diffusers expect: one, or NAME-00001-of-00002 with an index."""
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
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{name}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
