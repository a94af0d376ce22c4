"""Encoding: what is written, what is kept, and that a diffusion model trains on it and generates images."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scaling import data
from scaling.convert import stablehlo
from scaling.data.sources.latents import MANIFEST, LatentSource, ShardWriter, read
from scaling.errors import UserError
from scaling.evaluators import Frechet, Grid, autoencoder
from scaling.files import open_locked, read_json
from scaling.models import vae
from scaling.run import build, restore
from scaling.run.folder import read_events
from scaling.run.helpers import RunHelpers
from scaling.sampling import to_uint8
from scaling.training import config, encode, evaluate, loop
from tests.support.measuring import prepared
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_vae.py")
FLIP = {"data.train_transforms": ("flip",)}


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with random weights: its moments are as good as any."""
    folder = tmp_path_factory.mktemp("vae") / "run"
    write_run(build.build(config.load(TINY)), folder)
    return folder


@pytest.fixture(scope="module")
def folder(vae_run: Path) -> Path:
    encode.encode(vae_run, config.load(TINY, FLIP), vae_run.parent / "latents", 64)
    return vae_run.parent / "latents"


@pytest.fixture(scope="module")
def moments(vae_run: Path) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    """uint8 images to mean and log-variance, by the run's model itself."""
    trained = restore.restore_run(vae_run)
    apply = jax.jit(lambda p, x: trained.run.model.apply({"params": p}, x, method="moments"))
    return lambda images: apply(trained.weights["params"], jnp.asarray(images, jnp.float32) / 127.5 - 1)


def opened(folder: Path, split: str) -> LatentSource:
    return LatentSource(folder, split, read(folder))


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    source = data.open_source(data.Data(name="digits"), split)
    images, labels = source.read(np.arange(len(source))).values()
    return np.asarray(images), labels


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_encoded_reads_back(folder: Path, moments: Callable[..., Any], split: str) -> None:
    """Both views of every example of every split, rounded to float16 and no more."""
    images, labels = digits(split)
    records = opened(folder, split).records(np.arange(len(labels)))
    np.testing.assert_array_equal(records["label"], labels)
    for view, shown in enumerate((images, images[:, :, ::-1])):
        for part, expected in enumerate(moments(shown)):
            found = records["moments"][:, view, part].astype(np.float32)
            np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-5)


def test_the_scale_is_that_of_all_training_moments(folder: Path, moments: Callable[..., Any]) -> None:
    images, _ = digits("train")
    both = np.concatenate([images, images[:, :, ::-1]])
    latents = read(folder)
    mean, logvar = map(np.asarray, moments(both))
    assert latents.scale == pytest.approx((mean.var() + np.exp(logvar).mean()) ** -0.5, rel=1e-3)
    source = opened(folder, "train")
    before = source.read_train(np.arange(1438), 0, np.arange(1438))
    drawn = np.asarray(source.device_transform(jax.device_put(before), jax.random.key(0))["image"])
    assert drawn.std() == pytest.approx(1, rel=0.01)
    assert (latents.name, latents.shape, latents.views) == ("digits", (4, 4, 3), 2)
    assert {name: split.examples for name, split in latents.splits.items()} == {"train": 1438, "test": 359}


def test_stopped_half_way_it_keeps_whole_shards_and_ends_with_the_same_bytes(
    tmp_path: Path, vae_run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, out, writes = config.load(TINY, FLIP), tmp_path / "latents", iter(range(10**6))
    write = ShardWriter.write

    def stopped(self: ShardWriter, records: np.ndarray) -> None:
        if next(writes) == 14:  # in the third shard: a shard has 359 or 360 examples, six batches
            raise KeyboardInterrupt
        write(self, records)

    monkeypatch.setattr(ShardWriter, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode.encode(vae_run, cfg, out, 64)
    monkeypatch.undo()
    whole = {p.name: p.stat().st_mtime_ns for p in out.glob("*.array_record")}
    assert sorted(whole) == [f"train-0000{i}-of-00004.array_record" for i in (0, 1)]
    with pytest.raises(UserError, match=r"has no whole latents\.json"):
        read(out)
    (out / ".train-00002-of-00004.array_record.99999").write_bytes(b"what a killed process leaves")
    with (
        open_locked(out / "lock"),
        pytest.raises(UserError, match=r"^out=.*: another process is encoding there; wait"),
    ):
        encode.encode(vae_run, cfg, out, 64)
    encode.encode(vae_run, cfg, out, 64)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_killed_before_it_was_described_it_begins_again(tmp_path: Path, vae_run: Path, folder: Path) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    for name in ("lock", ".encoding.json.99999"):
        (out / name).write_text("")
    os.utime(out / ".encoding.json.99999", (0, 0))
    encode.encode(vae_run, config.load(TINY, FLIP), out, 64)
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}


def test_a_shard_that_is_damaged_is_named_and_a_missing_one_written_again(
    tmp_path: Path, vae_run: Path, folder: Path
) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    torn = out / "test-00001-of-00004.array_record"
    torn.write_bytes(torn.read_bytes()[:70_000])
    with pytest.raises(UserError, match=r"test-00001-of-00004\.array_record: has 0 of 90 records; delete it"):
        encode.encode(vae_run, config.load(TINY, FLIP), out, 64)
    torn.unlink()
    encode.encode(vae_run, config.load(TINY, FLIP), out, 64)
    assert torn.read_bytes() == (folder / torn.name).read_bytes()


@pytest.mark.parametrize("processes", [1, 2, 3, 16])
def test_processes_share_all_shards_and_none_twice(folder: Path, processes: int) -> None:
    latents = read(folder)
    shares = [encode.share(latents, i, processes) for i in range(processes)]
    every = [(split, i) for split in ("train", "test") for i in range(4)]
    assert sorted(shard for share in shares for shard in share) == sorted(every)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"data.train_transforms": ("pad_crop", "flip")}, r"data\.train_transforms: 'pad_crop' is random"),
    (
        {
            "data.train_transforms": ("center_crop",),
            "data.eval_transforms": ("adm_crop",),
            "data.image_size": 8,
        },
        r"data\.train_transforms=\('center_crop',\): images are cropped once, .* data\.eval_transforms has",
    ),
    ({"data.name": "latents", "data.data_dir": "x"}, r"data_dir='x': has no whole latents\.json"),
    ({"data.train_split": "val"}, r"split 'val'"),
]


@pytest.mark.parametrize(("overrides", "said"), BAD)
def test_what_cannot_be_encoded(tmp_path: Path, vae_run: Path, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        encode.encode(vae_run, config.load(TINY, overrides), tmp_path / "latents", 64)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "latents").exists()


def test_a_split_of_another_size_is_refused_before_anything_is_encoded(tmp_path: Path, vae_run: Path) -> None:
    sizes = {"train": 8, "test": 12}
    arrays = {f"{split}_images": np.zeros((4, side, side, 1), np.uint8) for split, side in sizes.items()}
    arrays |= {f"{split}_labels": np.arange(4) for split in sizes}
    np.savez(tmp_path / "odd.npz", **arrays)
    cfg = config.load(TINY, {"data.name": "npz", "data.data_dir": str(tmp_path / "odd.npz")})
    with pytest.raises(UserError, match=r"split='test': images of odd are \(12, 12, 1\), and the model sees"):
        encode.encode(vae_run, cfg, tmp_path / "latents", 64)
    assert not (tmp_path / "latents").exists()


def test_another_encoding_is_refused_and_nothing_is_touched(
    tmp_path: Path, vae_run: Path, folder: Path, generator: Path
) -> None:
    def refused(source: Path, overrides: dict[str, Any], out: Path, said: str, batch_size: int = 64) -> None:
        with pytest.raises(UserError, match=said) as error:
            encode.encode(source, config.load(TINY, overrides), out, batch_size)
        assert "\n" not in str(error.value)

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    refused(
        vae_run,
        {},
        folder,
        r"holds latents with data\.train_transforms=\('flip',\), not \(\); choose another",
    )
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    begun = read_json(folder / "encoding.json")
    (other / "encoding.json").write_text(json.dumps({**begun, "weights": "0" * 16}))
    refused(vae_run, FLIP, other, r"holds latents with weights='0{16}', not '\w+'")
    assert [p.name for p in other.iterdir()] == ["encoding.json"]
    refused(vae_run, FLIP, vae_run, r"out=.*: is no folder of latents")
    refused(vae_run, FLIP, tmp_path / "new", r"batch-size=60: must be a multiple of", batch_size=60)
    assert not (tmp_path / "new").exists()
    refused(generator, FLIP, tmp_path / "new", r"is a run of dit, which has no latent")
    shape = {"data.name": "npz", "data.data_dir": str(tmp_path / "rgb.npz")}
    np.savez(
        tmp_path / "rgb.npz", train_images=np.zeros((8, 8, 8, 3), np.uint8), train_labels=np.zeros(8, int)
    )
    refused(
        vae_run,
        {**shape, "evaluators.val.split": "train"},
        tmp_path / "new",
        r"does not fit the images of rgb: ch",
    )


def config_of(home: Path, evaluate: str) -> str:
    """tests/support/tiny_dit.py with evaluators."""
    text = (ROOT / "tests/support/tiny_dit.py").read_text()
    (home / "config.py").write_text(
        text.replace("checkpoint=", f"evaluators=dict({evaluate}),\n checkpoint=")
    )
    return str(home / "config.py")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Path:
    """A diffusion run on the latents, measured and sampled on the way."""
    source = config_of(
        folder.parent,
        """grid=dict(name="grid", every="100 %", samples=9, batch_size=16,
                     sampling=dict(integrator="euler", steps=2)),
           val=dict(name="metrics", every="100 %", batch_size=128)""",
    )
    loop.train(config.load(source, latent(folder)), folder.parent / "dit")
    return folder.parent / "dit"


def latent(folder: Path) -> dict[str, Any]:
    made = {"data.name": "latents", "data.data_dir": str(folder)}
    return {**made, "model.variant": "A/2", "train.duration": "4 steps"}


def test_a_run_on_latents_is_measured_in_images(generator: Path) -> None:
    (grid,) = (generator / "samples").iterdir()
    with Image.open(grid) as picture:
        assert picture.mode == "L" and picture.size == (2 + 3 * 10, 2 + 3 * 10)
    described = json.loads((generator / "config.json").read_text())
    assert described["data"]["image_shape"] == [4, 4, 3] and described["cost"]["tokens"] == 4
    logged = read_events(generator)[-1]["values"]
    assert evaluate.evaluate(generator) == pytest.approx(logged, rel=1e-3)
    assert logged.keys() == {"val_loss", "val_mse"}


@pytest.mark.slow
def test_the_distance_is_to_the_images_that_were_encoded(folder: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier"
    source = config_of(
        tmp_path,
        f"""fd=dict(name="frechet", classifier={str(classifier)!r}, every="100 %", samples=160,
                    classifier_config={str(ROOT / "tests/support/tiny_vit.py")!r}, batch_size=80,
                    sampling=dict(integrator="euler", steps=2))""",
    )
    values = loop.train(config.load(source, latent(folder)), tmp_path / "dit")
    assert values["fd_digits"] > values["fd_digits_floor"] > 0
    assert [p.name for p in classifier.glob("features_*")] == ["features_train.npz"]  # of its own images
    run = build.build(config.load(TINY.replace("vae", "dit"), {"data.name": "mnist"}))
    with pytest.raises(
        UserError, match=r"evaluators\.fd\.classifier=.*: sees \(8, 8, 1\), and this run makes"
    ):
        Frechet(classifier=str(classifier), classifier_config="").check("fd", run)


def test_samples_are_latents_over_their_scale_decoded(generator: Path, folder: Path, vae_run: Path) -> None:
    run = restore.restore_run(generator).run
    assert run.batch(2)["image"] == jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    assert autoencoder.decoded_shape(run) == (8, 8, 1)
    helpers = RunHelpers(run).all()

    def decoded(z: jax.Array, tile: int | None = None) -> jax.Array:
        return jax.jit(lambda helpers, z: autoencoder.decode(run, helpers, z, tile))(helpers, z)

    trained = restore.restore_run(vae_run)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    decode = jax.jit(lambda p, z: trained.run.model.apply({"params": p}, z, method="decode"))
    expected = decode(trained.weights["params"], z)
    found = decoded(z * read(folder).scale)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    tiled = decoded(z * read(folder).scale, tile=3)
    by_tiles = jax.jit(
        lambda z: vae.tiled_decode(functools.partial(decode, trained.weights["params"]), z, 3, 0)
    )
    np.testing.assert_allclose(tiled, by_tiles(z), rtol=1e-3, atol=1e-4)
    assert float(np.abs(tiled - expected).max()) > 1e-3


def test_samples_need_the_autoencoder_and_not_the_latents(
    generator: Path, folder: Path, vae_run: Path, tmp_path: Path
) -> None:
    moved = folder.rename(folder.with_name("moved"))
    try:
        evaluate.sample(generator, tmp_path / "a.png", tmp_path / "a.npz", 4, 8, {})
    finally:
        moved.rename(folder)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (4, 8, 8, 1) and arrays["images"].dtype == np.uint8
    moved = vae_run.rename(vae_run.with_name("away"))
    try:
        with pytest.raises(
            UserError, match=r"data\.data_dir=.*: its autoencoder: run=.*: no config\.json there"
        ):
            evaluate.sample(generator, tmp_path / "b.png", None, 4, 8, {})
    finally:
        moved.rename(vae_run)


def test_a_folder_with_former_keys_is_read_and_kept(tmp_path: Path, vae_run: Path, folder: Path) -> None:
    older = tmp_path / "latents"
    shutil.copytree(folder, older)
    for name in (MANIFEST, encode.BEGUN):
        description = read_json(older / name)
        images = description["data"]
        images["augment"], images["text"]["too_long"] = (
            images.pop("train_transforms"),
            images["text"].pop("overflow"),
        )
        (older / name).write_text(json.dumps(description))
    assert read(older) == read(folder)
    shards = {path: path.stat().st_mtime_ns for path in older.glob("*.array_record")}
    encode.encode(vae_run, config.load(TINY, FLIP), older, 64)
    assert {path: path.stat().st_mtime_ns for path in older.glob("*.array_record")} == shards


def test_an_autoencoder_that_has_changed_decodes_nothing(
    folder: Path, vae_run: Path, tmp_path: Path, tiny: dict[str, str]
) -> None:
    described = read_json(folder / MANIFEST)
    (tmp_path / "latents").mkdir()
    for path in folder.glob("*.array_record"):
        (tmp_path / "latents" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "latents" / MANIFEST).write_text(json.dumps({**described, "weights": "0" * 16}))
    run = build.build(config.load(tiny["dit"], latent(tmp_path / "latents")))
    with pytest.raises(UserError, match=r"its autoencoder .* has changed since; encode again"):
        prepared(Grid(sampling=run.config.sampling), "grid", run)


@pytest.mark.slow
def test_resumed_on_latents_is_unbroken(
    generator: Path, folder: Path, tmp_path: Path, tiny: dict[str, str], read_state: Callable[..., Any]
) -> None:
    longer = config.load(tiny["dit"], {**latent(folder), "train.duration": "6 steps"})
    loop.train(longer, tmp_path / "whole")
    loop.train(config.load(tiny["dit"], latent(folder)), tmp_path / "parts")
    loop.train(longer, tmp_path / "parts")
    one, two = (read_state(tmp_path / name, longer) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_an_exported_generator_decodes(generator: Path, tmp_path: Path) -> None:
    stablehlo.export_function(generator, tmp_path / "function")
    function = jax.export.deserialize(bytearray((tmp_path / "function/function.bin").read_bytes()))
    evaluate.sample(generator, tmp_path / "a.png", tmp_path / "a.npz", 4, 8, {})
    with np.load(tmp_path / "a.npz") as arrays:
        expected, labels = arrays["images"], arrays["labels"]
    found = to_uint8(function.call(jnp.arange(4, dtype=jnp.int32), jnp.asarray(labels)))
    assert np.abs(np.asarray(found, int) - expected.astype(int)).max() <= 1
