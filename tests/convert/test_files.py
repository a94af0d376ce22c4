"""Files of tensors: what is read, what is refused, and that nothing is written over or left half-written."""

import argparse
import io
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from scaling.convert import files
from scaling.errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def check(tensors: dict[str, np.ndarray]) -> None:
    assert tensors.keys() == WEIGHTS.keys()
    np.testing.assert_array_equal(tensors["a.weight"], np.arange(6.0, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(tensors["b"].astype(np.float32), np.ones(2, np.float32))


def test_safetensors_and_torch_files_and_folders(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save({"ema": WEIGHTS, "model": {}, "step": 3}, tmp_path / "training.pt")
    for file in ("model.safetensors", "plain.pt", "training.pt", "."):
        check(files.read_tensors(tmp_path / file))


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for i, name in enumerate(WEIGHTS):
        save_file({name: WEIGHTS[name]}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(WEIGHTS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(files.read_tensors(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"the index names model-1\.safetensors, which are missing"):
        files.read_tensors(tmp_path)
    for broken in ("{", "[1]", "{}", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(UserError, match=r"index\.json: is not .*; get the file again"):
            files.read_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "pytorch_model.bin.index.json")
    assert files.read_tensors(tmp_path).keys() == {"a.weight"}  # that index is of other files


def test_a_tensor_in_two_files_is_not_chosen_between(tmp_path: Path) -> None:
    for name in ("model.fp16", "model"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    message = r"a\.weight is in model\.safetensors and in another file; give one of them"
    with pytest.raises(UserError, match=message):
        files.read_tensors(tmp_path)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made by the file"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Malicious(target)}, protocol=2))
    torch.save({"a": Malicious(target)}, tmp_path / "evil2.pt")
    torch.save({"model": WEIGHTS, "args": Malicious(target)}, tmp_path / "evil3.pt")
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(a=Malicious(target))}, tmp_path / "evil4.pt")
    for i in ("", 2, 3, 4):
        message = r"cannot be read as tensors alone \(.*it would call \w+.mkdir.*\); save its state_dict\(\)"
        with pytest.raises(UserError, match=message) as e:
            files.read_tensors(tmp_path / f"evil{i}.pt")
        assert "\n" not in str(e.value)
    assert not target.exists()


def test_a_program_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and files of it remain
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    message = (
        r"program\.pt: is a TorchScript archive, .* save model\.state_dict\(\) of model = torch\.jit\.load"
    )
    with pytest.raises(UserError, match=message):
        files.read_tensors(tmp_path / "program.pt")


def test_arguments_beside_the_weights_and_parameters_are_read(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}
    torch.save({"model": parameters, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "training.pt")
    check(files.read_tensors(tmp_path / "training.pt"))


def test_tensors_that_numpy_has_not_are_named(tmp_path: Path) -> None:
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2).to(torch.float8_e4m3fn)):
        torch.save({"odd": tensor}, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=r"odd\.pt: odd cannot be read .*; save it as a plain float32"):
            files.read_tensors(tmp_path / "odd.pt")


def test_what_is_broken_or_foreign_is_refused_in_a_line(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    for ending in ("safetensors", "pt"):
        content = (tmp_path / f"whole.{ending}").read_bytes()
        for name, data in (("cut", content[:-7]), ("text", b"hello"), ("empty", b"")):
            (tmp_path / f"{name}.{ending}").write_bytes(data)
            with pytest.raises(UserError, match=f"{name}.{ending}: cannot be read as") as e:
                files.read_tensors(tmp_path / f"{name}.{ending}")
            assert "\n" not in str(e.value)
    with zipfile.ZipFile(tmp_path / "foreign.pt", "w") as archive:
        archive.writestr("notes/hello.txt", "hello")
    with pytest.raises(UserError, match=r"foreign\.pt: cannot be read as tensors alone") as e:
        files.read_tensors(tmp_path / "foreign.pt")
    assert "\n" not in str(e.value)
    for other in ([1, 2], {1: torch.ones(1)}, {"step": 3}):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(UserError, match="is not a state dict of tensors"):
            files.read_tensors(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no such file or folder"):
        files.read_tensors(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        files.read_tensors(tmp_path / "bare")


def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    assert files.read_config(tmp_path) is None
    for content in ("{", "[1]", "null"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: is not .*; get the file again"):
            files.read_config(tmp_path)


def test_a_folder_is_written_whole_in_shards_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    files.write_folder(tmp_path / "one", "model", tensors, {"config.json": b"{}"})
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    ]
    monkeypatch.setattr(files, "SHARD", 2 * 64)
    files.write_folder(tmp_path / "three", "model", tensors, {})
    assert len(list((tmp_path / "three").glob("model-0000?-of-00003.safetensors"))) == 3
    read = files.read_tensors(tmp_path / "three")
    assert all(np.array_equal(read[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(UserError, match="exists; choose another folder, nothing is written over"):
        files.write_folder(tmp_path / "one", "model", {}, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.write_folder(tmp_path / "four", "model", tensors, {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one", "three"]


def saved(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# Of a damaged file of each kind: whether what is then read may differ from what was saved, since it has no
# checksum of its own.
KINDS: dict[str, tuple[str, Callable[[], bytes], bool]] = {
    "safetensors": ("a.safetensors", lambda: save(WEIGHTS), True),
    "torch": ("a.pt", lambda: saved(zipped=True), False),
    "torch before 1.6": ("a.pt", lambda: saved(zipped=False), True),
}
CHANGES = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@given(CHANGES)
@settings(max_examples=150)
def test_a_damaged_file_is_read_or_refused(kind: str, changes: list[tuple[int, int]]) -> None:
    name, whole, unchecked = KINDS[kind]
    content = bytearray(whole())
    for place, value in changes:
        content[place % len(content)] = value
    read = read_or_refuse(name, bytes(content))
    if read is not None and unchecked:
        assert all(isinstance(tensor, np.ndarray) and len(name) for name, tensor in read.items())
    elif read is not None:
        check(read)


SIZES = st.sampled_from([0, 1, 1, 2, 2**40, 2**63, 2**64 - 1, -1, 1.5, None])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "F4", "", 3]),
        "shape": st.lists(SIZES, max_size=3) | st.just([1] * 70),
        "data_offsets": st.sampled_from([[0, 0], [0, 4], [0, 2], [2, 4], [4, 8], [4, 0], [0, 2**63], None]),
    }
)


@given(
    st.dictionaries(st.sampled_from(["a", "b\nc", "__metadata__"]), ENTRIES, max_size=2),
    st.sampled_from([b"", b"\1\0", b"\0\1\2\3"]),
)
@settings(max_examples=300)
def test_any_header_is_read_or_refused(header: dict[str, Any], data: bytes) -> None:
    """What is read has the shapes of the header, and as its bytes those of the file."""
    head = json.dumps(header).encode()
    read = read_or_refuse("a.safetensors", len(head).to_bytes(8, "little") + head + data)
    if read is not None:
        assert {name: list(tensor.shape) for name, tensor in read.items()} == {
            name: entry["shape"] for name, entry in header.items() if name != "__metadata__"
        }
        assert sum(tensor.nbytes for tensor in read.values()) == len(data)
        assert all(tensor.tobytes() in data for tensor in read.values())


SHARDS = st.sampled_from(["model.safetensors", "model\n2.safetensors", "", 3, None])


@given(
    st.recursive(
        SHARDS,
        lambda inner: (
            st.dictionaries(st.sampled_from(["weight_map", "a"]), inner, max_size=2)
            | st.lists(inner, max_size=2)
        ),
    )
)
@settings(max_examples=100)
def test_any_index_of_shards_is_obeyed_or_refused(index: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(WEIGHTS, Path(folder) / "model.safetensors")
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
        try:
            check(files.read_tensors(Path(folder)))
        except UserError as e:
            assert folder in str(e) and "\n" not in str(e)


def read_or_refuse(name: str, content: bytes) -> dict[str, np.ndarray] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return files.read_tensors(path)
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            return None
