"""Latents: what a folder promises, draws that depend on nothing but seed and position, and damage."""

import itertools
import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling.data import Data, eval_batches, info, open_source, train_batches
from scaling.data.sources.latents import MANIFEST, LatentSource, ShardWriter, Split, read
from scaling.errors import UserError
from scaling.files import read_json
from tests.support.latents import write_latents

Records = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_latents(tmp_path / "latents")
    return tmp_path / "latents"


def section(folder: Path) -> Data:
    return Data(name="latents", data_dir=str(folder), batch_size=16)


def opened(folder: Path, split: str = "train") -> LatentSource:
    source = open_source(section(folder), split)
    assert isinstance(source, LatentSource)
    return source


def sharding(devices: int = 8) -> NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1), ("data", "fsdp"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def test_a_folder_reads_back(tmp_path: Path) -> None:
    written = write_latents(tmp_path / "latents")
    for split, records in written.items():
        source = opened(tmp_path / "latents", split)
        assert len(source) == len(records)
        indices = np.random.default_rng(1).permutation(len(records))
        found = source.records(indices)
        assert found.tobytes() == records[indices].tobytes()
    assert read(tmp_path / "latents").splits == {"train": Split(50, 4), "test": Split(11, 4)}


def test_what_is_known_before_any_example(folder: Path) -> None:
    found = info(section(folder))
    assert (found.name, found.num_classes, found.image_shape, found.train_examples) == (
        "mnist", 10, (4, 4, 3), 50,
    )  # fmt: skip
    assert found.columns["image"][1] == "float32" and found.latents == read(folder)
    assert info(Data()).columns["image"][1] == "uint8"


def test_shards_are_fixed_ranges_of_all_examples() -> None:
    for examples in (1, 3, 4, 50, 4000, 40_001, 1_281_167):
        split = Split.of(examples)
        spans = [split.span(i) for i in range(split.shards)]
        assert [i for span in spans for i in span] == list(range(examples))
        assert all(0 < len(span) <= 10_000 for span in spans)
    assert Split.of(1_281_167).shards == 129


def test_training_draws_from_the_posterior_of_either_view(tmp_path: Path) -> None:
    records = write_latents(tmp_path / "latents")["train"]
    source = opened(tmp_path / "latents")
    before = source.read_train(np.full(4000, 17), seed=0, positions=np.arange(4000))
    drawn, labels = jax.device_get(
        source.device_transform(jax.device_put(before), jax.random.key(0))
    ).values()
    assert drawn.shape == (4000, 4, 4, 3) and drawn.dtype == np.float32 and labels.dtype == np.int32
    assert (labels == records[17]["label"]).all()
    mean, logvar = np.moveaxis(records[17]["moments"].astype(np.float64), 1, 0)  # [2 views, 4, 4, 3] each
    deviation = 0.5 * np.exp(logvar / 2)  # at the folder's scale
    z = (drawn[:, None] - 0.5 * mean) / deviation  # as draws from either view
    nearest = (z**2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert 0.47 < nearest.mean() < 0.53
    for view in (0, 1):
        ours = z[nearest == view, view]
        np.testing.assert_allclose(ours.mean(axis=0), 0, atol=0.1)
        np.testing.assert_allclose(ours.std(axis=0), 1, atol=0.1)
    assert len(np.unique(drawn[:, 0, 0, 0])) > 3900  # each time another


def test_the_view_is_a_function_of_seed_and_position(folder: Path) -> None:
    source = opened(folder)
    indices = np.arange(40) % 7
    positions = np.concatenate([np.arange(39), [2**40]])
    together, labels = source.read_train(indices, 5, positions).values()
    for i in range(40):
        alone, label = opened(folder).read_train(indices[i : i + 1], 5, positions[i : i + 1]).values()
        np.testing.assert_array_equal(alone[0], together[i])
        assert label[0] == labels[i]
    assert not np.array_equal(source.read_train(indices, 6, positions)["image"], together)


def test_batches_are_the_same_on_one_device_and_eight(folder: Path) -> None:
    one, eight = (
        [jax.device_get(b) for b in itertools.islice(train_batches(section(folder), 3, 0, place), 4)]
        for place in (sharding(1), sharding(8))
    )
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_a_draw_is_another_at_every_step_and_for_every_seed(tmp_path: Path) -> None:
    """16 examples, so that each batch has them all."""
    write_latents(tmp_path / "latents", train=16)
    draws = []
    for seed in (3, 4):
        stream = train_batches(section(tmp_path / "latents"), seed, 0, sharding())
        draws += [np.asarray(batch["image"]) for batch in itertools.islice(stream, 2)]
    assert len(np.unique(draws)) > 0.99 * np.size(draws)


def test_evaluation_is_a_fixed_draw_of_the_image_as_it_is(tmp_path: Path) -> None:
    records = write_latents(tmp_path / "latents", views=2, test=2000)["test"]
    first, again = (
        list(map(jax.device_get, eval_batches(section(tmp_path / "latents"), "test", 512, sharding())))
        for _ in range(2)
    )
    images = np.concatenate([batch["image"] for batch in first])[:2000]
    np.testing.assert_array_equal(images, np.concatenate([batch["image"] for batch in again])[:2000])
    mean, logvar = np.moveaxis(records["moments"][:, 0].astype(np.float64), 1, 0)
    z = (images / 0.5 - mean) / np.exp(logvar / 2)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01


def test_restart_at_any_step_gives_the_same_bits(folder: Path) -> None:
    def batches(start: int, count: int) -> list:
        stream = train_batches(section(folder), 3, start, sharding())
        return [jax.device_get(batch) for batch in itertools.islice(stream, count)]

    unbroken = batches(0, 8)  # 128 of 50 examples: beyond two epochs
    assert unbroken[0]["image"].shape == (16, 4, 4, 3) and unbroken[0]["image"].dtype == np.float32
    for ours, theirs in zip(batches(5, 3), unbroken[5:], strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_worker_process_reads_the_same(folder: Path) -> None:
    source = opened(folder)
    there = source.read(np.arange(50))["image"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(np.arange(50))["image"], there)


def test_missing_truncated_and_damaged_shards_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    write_latents(folder, train=400)
    path = folder / "train-00002-of-00004.array_record"
    whole = path.read_bytes()
    for cut in (0, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"train-00002-of-00004.array_record: has 0 of 100 records; del"):
            info(section(folder))
    path.write_bytes(whole.replace(whole[2000:2004], b"\x00\x01\x02\x03", 1))
    with pytest.raises(UserError, match=r"train-00002-of-00004.array_record: is damaged .*; delete it") as e:
        opened(folder).read(np.arange(400))
    assert "\n" not in str(e.value)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00002-of-00004.array_record: is not there; `scaling encode`"):
        info(section(folder))
    assert len(opened(folder, "test")) == 11


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split 'val': .* has train, test"):
        open_source(section(folder), "val")
    with pytest.raises(UserError, match=r"data_dir=.*: has no whole latents\.json; `scaling encode`"):
        info(section(tmp_path / "none"))
    described = read_json(folder / MANIFEST)
    assert described
    (folder / MANIFEST).write_text(json.dumps({**described, "views": "two"}))
    with pytest.raises(UserError, match=r"latents\.json\.views='two': must be an integer"):
        info(section(folder))
    del described["scale"]
    (folder / MANIFEST).write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"latents\.json\.scale: needs a value"):
        info(section(folder))
    (folder / MANIFEST).write_text(json.dumps(described)[:50])
    with pytest.raises(UserError, match=r"latents\.json: is not JSON"):
        info(section(folder))


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path, error: Exception | None = None) -> None:
        with ShardWriter(path) as writer:
            writer.write(np.zeros(10, np.int32))
            if error:
                raise error

    with pytest.raises(UserError, match=r"gone/a\.array_record: cannot be written"):
        write(tmp_path / "gone/a.array_record")
    with pytest.raises(RuntimeError, match="elsewhere"):
        write(tmp_path / "a.array_record", RuntimeError("elsewhere"))
    assert not list(tmp_path.iterdir())
