"""The global order, restarts, hosts, and exact evaluation, on eight virtual devices."""

import dataclasses
import gc
import itertools
import resource
import threading

import jax
import numpy as np
import pytest

from scaling.data import Data, eval_batches, open_source, train_batches
from scaling.data.pipeline import eval_rows, host_batches, local_rows, shuffled, train_rows
from scaling.data.transforms import transform
from scaling.errors import UserError
from tests.support.shardings import sharding

DIGITS = Data(name="digits", batch_size=64)
AUGMENTED = Data(name="digits", batch_size=64, train_transforms=("pad_crop", "flip"))
N = 1438  # training digits


def train(data: Data, start: int, count: int, seed: int = 0, mesh: tuple[int, ...] = (4, 2, 1)) -> list:
    stream = train_batches(data, seed, start, sharding(*mesh))
    return [jax.device_get(batch) for batch in itertools.islice(stream, count)]


def assert_same(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_rows_follow_the_shuffled_stream() -> None:
    """Row r of step s is example s·B + r, read one by one: the batched lookup changes nothing."""
    source = open_source(DIGITS, "train")
    for step, batch in enumerate(train(DIGITS, 0, 24)):  # past the first epoch
        order = shuffled(np.arange(step * 64, step * 64 + 64), N, seed=0)
        examples = [source.read(np.array([index])) for index in order]
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], np.concatenate([e[name] for e in examples]))


def test_each_epoch_is_another_permutation() -> None:
    epochs = shuffled(np.arange(3 * N), N, seed=0).reshape(3, N)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(N), (3, 1)))
    orders = [*epochs, shuffled(np.arange(N), N, seed=1)]
    for one, other in itertools.combinations([np.arange(N), *orders], 2):
        assert np.mean(one == other) < 0.01  # chance: 1/N
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_every_order_of_a_tiny_set_is_equally_likely() -> None:
    orders = shuffled(np.arange(6000 * 3), 3, seed=0).reshape(-1, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5  # chi-squared, 5 degrees: p = 0.001


def test_the_order_never_changes() -> None:
    """Written down, so that a run resumed under other versions goes on with the same examples."""
    assert shuffled(np.arange(8), 8, seed=0).tolist() == ORDER_OF_SEED_0
    assert shuffled(np.arange(8, 16), 8, seed=0).tolist() == ORDER_OF_EPOCH_1


ORDER_OF_SEED_0 = [0, 2, 1, 5, 4, 3, 6, 7]
ORDER_OF_EPOCH_1 = [1, 2, 3, 5, 0, 4, 7, 6]


@pytest.mark.parametrize("data", [DIGITS, AUGMENTED], ids=["plain", "augmented"])
def test_restart_at_any_step(data: Data) -> None:
    unbroken = train(data, 0, 25)
    assert_same(train(data, 7, 3), unbroken[7:10])
    assert_same(train(data, 22, 3), unbroken[22:])  # 22 · 64 < 1438 < 23 · 64: across the epoch's end


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_any_mesh_gets_the_same_batches(mesh: tuple[int, int, int]) -> None:
    reference = train(AUGMENTED, 5, 2)
    assert_same(train(AUGMENTED, 5, 2, mesh=mesh), reference)
    batch = next(train_batches(AUGMENTED, 0, 5, sharding(*mesh)))
    assert batch["image"].sharding.is_equivalent_to(sharding(*mesh), 4)
    for shard in batch["image"].addressable_shards:
        np.testing.assert_array_equal(shard.data, reference[0]["image"][shard.index])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (2, 1, 4)])
def test_hosts_read_their_contiguous_share(hosts: int, mesh: tuple[int, int, int]) -> None:
    """Hosts of 8 / hosts devices each: together they hold the one global batch, in mesh order."""
    place = sharding(*mesh)
    groups = np.array(jax.devices()).reshape(hosts, -1)
    rows = [local_rows(place, 64, group.tolist()) for group in groups]
    for part in rows:
        np.testing.assert_array_equal(np.diff(part), 1)
    np.testing.assert_array_equal(np.unique(np.concatenate(rows)), np.arange(64))
    if hosts <= mesh[0] * mesh[1]:  # no two hosts share a row
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(64))
    source = open_source(AUGMENTED, "train")
    whole = train(AUGMENTED, 30, 1)[0]
    for part in rows:
        share = train_rows(30, source, AUGMENTED, 0, part)
        assert_same([share], [{name: value[part] for name, value in whole.items()}])


def test_a_host_reads_only_its_share() -> None:
    source = open_source(DIGITS, "train")
    asked: list[int] = []

    class Watched:
        name, num_classes, image_shape = source.name, source.num_classes, source.image_shape

        def __len__(self) -> int:
            return len(source)

        def read(self, indices: np.ndarray) -> dict:
            asked.extend(indices.tolist())
            return source.read(indices)

    train_rows(3, Watched(), DIGITS, 0, np.arange(16, 32))
    assert asked == shuffled(np.arange(3 * 64 + 16, 3 * 64 + 32), N, 0).tolist()
    asked.clear()
    eval_rows(1, Watched(), DIGITS, 64, np.arange(16, 32))
    assert asked == list(range(64 + 16, 64 + 32))


def test_seeds_differ_and_augmentation_follows_the_position() -> None:
    source = open_source(AUGMENTED, "train")
    plain, augmented = train(DIGITS, 0, 24), train(AUGMENTED, 0, 24)
    for one, other in zip(plain, augmented, strict=True):
        np.testing.assert_array_equal(one["label"], other["label"])  # the order is not touched
    assert not np.array_equal(plain[0]["image"], augmented[0]["image"])
    assert not np.array_equal(train(DIGITS, 0, 1, seed=1)[0]["image"], plain[0]["image"])
    for step in (0, 23):
        expected = transform(
            plain[step]["image"], AUGMENTED.train_transforms, 0, 0, np.arange(step * 64, step * 64 + 64)
        )
        np.testing.assert_array_equal(augmented[step]["image"], np.stack(expected))
    # The same example in two epochs is augmented in two ways.
    positions = np.flatnonzero(shuffled(np.arange(40 * N), N, 0) == 0)
    seen = set()
    for position in positions:
        row = train_rows(position // 64, source, AUGMENTED, 0, np.array([position % 64]))
        seen.add(row["image"].tobytes())
    assert len(seen) > 20


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_keep_the_order(threads: int) -> None:
    data = Data(
        name="digits", batch_size=64, train_transforms=("pad_crop", "flip"), threads=threads, prefetch=3
    )
    assert_same(train(data, 0, 12), train(AUGMENTED, 0, 12))


def test_worker_processes_keep_the_order() -> None:
    data = Data(name="digits", batch_size=64, train_transforms=("pad_crop", "flip"), workers=2, threads=1)
    assert_same(train(data, 3, 5), train(AUGMENTED, 3, 5))


def test_leaving_early_ends_the_threads() -> None:
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]

    gc.collect()
    before = set(readers())
    stream = train_batches(DIGITS, 0, 0, sharding(8, 1, 1))
    next(stream)
    new = set(readers()) - before
    assert new
    stream.close()  # type: ignore[attr-defined]
    for thread in new:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("batch_size", [8, 64, 512])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1)])
def test_evaluation_sees_every_example_once_in_order(batch_size: int, mesh: tuple[int, ...]) -> None:
    source = open_source(DIGITS, "test")  # 359: no multiple of any batch
    images, labels = source.read(np.arange(len(source))).values()
    batches = [jax.device_get(b) for b in eval_batches(DIGITS, "test", batch_size, sharding(*mesh))]
    assert len(batches) == -(-359 // batch_size)
    assert all(b["image"].shape == (batch_size, 8, 8, 1) and b["mask"].dtype == np.float32 for b in batches)
    joined = {name: np.concatenate([b[name] for b in batches]) for name in ("image", "label", "mask")}
    np.testing.assert_array_equal(joined["mask"], np.arange(len(joined["mask"])) < 359)
    np.testing.assert_array_equal(joined["image"][:359], images)
    np.testing.assert_array_equal(joined["label"][:359], labels)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_evaluate_as_many_batches_and_all_examples(hosts: int) -> None:
    source = open_source(DIGITS, "test")
    groups = np.array(jax.devices()).reshape(hosts, -1)
    count = 0.0
    for group in groups:
        rows = local_rows(sharding(8, 1, 1), 512, group.tolist())
        share = eval_rows(0, source, DIGITS, 512, rows)  # the last hosts have padding alone
        assert share["image"].shape == (512 // hosts, 8, 8, 1)
        count += float(share["mask"].sum())
    assert count == 359


def test_evaluation_crops_without_augmenting() -> None:
    data = Data(
        name="digits",
        batch_size=64,
        image_size=6,
        train_transforms=("random_resized_crop",),
        eval_transforms=("center_crop(1)",),
    )
    place = sharding(8, 1, 1)
    one, other = (jax.device_get(list(eval_batches(data, "test", 64, place))) for _ in range(2))
    assert one[0]["image"].shape == (64, 6, 6, 1)
    assert_same(one, other)
    assert train(data, 0, 1)[0]["image"].shape == (64, 6, 6, 1)


def test_a_batch_that_the_mesh_does_not_divide() -> None:
    data = Data(name="digits", batch_size=60)
    with pytest.raises(UserError, match="batch_size=60: must be a multiple of 8"):
        train_batches(data, 0, 0, sharding(4, 2, 1))
    with pytest.raises(UserError, match="batch_size=60: must be a multiple of 8"):
        eval_batches(data, "test", 60, sharding(8, 1, 1))
    next(train_batches(data, 0, 0, sharding(2, 2, 2)))  # 4 divides 60


def test_workers_that_may_open_too_few_files_are_refused_before_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    batches = host_batches(dataclasses.replace(DIGITS, workers=4), open_source(DIGITS, "train"), [0], 4)
    with pytest.raises(
        UserError, match=r"^data\.workers=4: takes \d+ open files, and the system allows 64; "
    ):
        next(batches)
