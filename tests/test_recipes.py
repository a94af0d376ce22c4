"""Every shipped recipe on data in the layout that it names: batches through its whole loader, and a step.

At its smallest variant and two examples a step, on one device. What is small is the data, not their way:
files in the formats of the sets, decoding, every transform, tokens, normalisation, loss, update, evaluation.
"""

import dataclasses
import io
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from scaling import data, evaluators
from scaling.cli import main
from scaling.evaluators.base import Context, Evaluator, data_of
from scaling.overrides import flat
from scaling.run import build, restore, state
from scaling.run import config as run_config
from scaling.run.helpers import RunHelpers
from scaling.run.options import Config
from scaling.training import config, loop, warm_start
from scaling.training.import_weights import create_run_from_weights
from tests.support.latents import write_latents
from tests.support.videos import write_video

ROOT = Path(__file__).parents[1]
# The smallest variant of each recipe that has sizes; the others have one.
SMALLEST = {
    "cifar10_dit": "A/4", "cifar10_vit": "A/4", "clip": "ViT-F/16", "digits_dit": "A/2", "dit": "A/4",
    "imagenet_vae": "small",
    "mnist_dit": "A/14", "mnist_latent_dit": "A/7", "mnist_resnet": "A", "mnist_swin": "A",
    "mnist_vit": "A/14", "openmoji_clip": "ViT-F/16", "openmoji_vilt": "A/16", "resnet": "A", "swin": "A",
    "vilt": "A/16", "vit": "A/14", "vivit": "A/14x2",
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "clip": {"objective.chunk": 1},
    "mnist_unet": {"model.multipliers": (1, 2), "model.attention": (2,)},  # of three stages, two
    "imagenet_vae": {"model.channels": 3, "data.image_size": 64},
    "vilt": {"model.resolution": 384},
    "vivit": {"train.init_from": None},  # for which there must be weights: below
    "mnist_vivit": {"model.variant": "A/14x2"},
}
SETS = {  # of TFDS: version, label's classes, H and W, split -> examples
    "imagenet2012": ("5.1.0", 1000, (None, None), {"train": 6, "validation": 5}),
    "cifar10": ("3.0.2", 10, (32, 32), {"train": 6, "test": 5}),
}
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "pretrained")


def photo(i: int, kind: str = "JPEG", side: int | None = None) -> bytes:
    """A picture as sets have them: of any size, upright or wide, in colour or grey, or lying on its side."""
    rng, file = np.random.default_rng(i), io.BytesIO()
    height, width = (side, side) if side else (40 + 37 * (i % 3), 50 + 61 * (i % 4))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 1 + i % 8
    image = image.convert("L") if i % 5 == 4 and side is None else image
    image.save(file, kind, **({} if side else {"exif": exif}))
    return file.getvalue()


def write_tfds(folder: Path) -> None:
    """The sets as `tfds build` leaves them."""
    for name, (version, classes, sides, splits) in SETS.items():
        kind = "PNG" if sides[0] else "JPEG"
        features = {
            "image": tfds.features.Image(shape=(*sides, 3), encoding_format=kind.lower()),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
        examples = {
            split: [{"image": photo(i, kind, sides[0]), "label": i % classes} for i in range(count)]
            for split, count in splits.items()
        }
        with tfds.core.registered.skip_registration():
            builder = type("Small", (Prepared,), {"name": name, "VERSION": tfds.core.Version(version),
                                                  "FEATURES": features, "EXAMPLES": examples})  # fmt: skip
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()


with tfds.core.registered.skip_registration():

    class Prepared(tfds.core.GeneratorBasedBuilder):
        """Examples that are at hand, under another set's name."""

        VERSION = tfds.core.Version("1.0.0")
        FEATURES: ClassVar[Any] = {}
        EXAMPLES: ClassVar[Any] = {}

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

        def _split_generators(self, manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in self.EXAMPLES}

        def _generate_examples(self, split: str) -> Iterator[Any]:
            yield from enumerate(self.EXAMPLES[split])


def write_pairs(folder: Path) -> None:
    """Tar shards of images and captions, and BERT's vocabulary, with some of its words."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        with tarfile.open(folder / split / "00000.tar", "w") as shard:
            for i in range(12):
                for name, content in (
                    (f"{i}.jpg", photo(i)),
                    (f"{i}.txt", f"A photo of number {i}\n".encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "number", *map(str, range(12))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with what the recipes name relative to it."""
    folder = tmp_path_factory.mktemp("layout")
    write_tfds(folder / "tfds")
    write_pairs(folder / "pairs")
    for split in ("train", "val"):
        for name in ("jump", "run"):
            for i in range(2):
                write_video(folder / "kinetics400" / split / name / f"{i}.mp4", frames=70)
    write_latents(folder / "runs/imagenet256", shape=(32, 32, 4), held_out="validation")
    write_latents(folder / "runs/mnist_latents", shape=(7, 7, 4))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def small(recipe: str, layout: Path, **more: Any) -> Config:
    source = f"configs/{recipe}.py" + (f":{SMALLEST[recipe]}" if recipe in SMALLEST else "")
    overrides = {"data.batch_size": 2, "data.workers": 0, **MORE.get(recipe, {}), **more}
    cfg = config.load(source, overrides)
    places = ["data", *(f"evaluators.{name}.data" for name in cfg.evaluators)]
    values = flat(cfg.raw)
    folders = {}  # from the root, as a process remembers opened sets by name, and other tests run in it
    for place in places:
        named = values.get(f"{place}.data_dir") or ("tfds" if values.get(f"{place}.name") == "tfds" else None)
        if named:
            folders[f"{place}.data_dir"] = str(layout / named)
    return run_config.changed(cfg, folders)


def some_state(run: build.Run) -> Any:
    """A state of small random numbers: to compile how the real one starts would take half of the time."""
    rng = np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = np.abs(rng.normal(0.0, 0.02, leaf.shape)) if floating else np.zeros(leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(filled, state.abstract(run))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_reads_real_batches(recipe: str, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shapes and types with which tests/training/test_config.py traces its step."""
    monkeypatch.chdir(layout)
    cfg = small(recipe, layout)
    run = build.build(cfg, jax.devices()[:1])
    batch = next(data.train_batches(cfg.data, cfg.train.seed, 0, run.batch_sharding()))
    found = {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert found == {name: (x.shape, x.dtype) for name, x in run.batch(2).items()}
    for name, evaluator in evaluators.make(cfg.evaluators).items():
        read_what_is_evaluated(name, evaluator, run)


# A recipe of each objective and kind of data takes its step on them in every run of the tests.
QUICK = ("cifar10_vit", "mnist_latent_dit", "mnist_vivit", "openmoji_clip", "vilt")


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_takes_a_step_on_them(recipe: str, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout)
    cfg = small(recipe, layout)
    run = build.build(cfg, jax.devices()[:1])
    batches = data.train_batches(cfg.data, cfg.train.seed, 0, run.batch_sharding())
    current, step, traced_hparams = some_state(run), state.make_step(run), state.traced_hparams(run)
    before = jax.tree.map(np.asarray, current.params)
    for _, batch in zip(range(2), batches, strict=False):  # the rate of the first step may be 0
        current, metrics = step(current, batch, traced_hparams)
        assert all(math.isfinite(float(value)) for value in metrics.values()), metrics
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), current.params, before)
    assert any(jax.tree.leaves(moved))


def read_what_is_evaluated(name: str, evaluator: Any, run: build.Run) -> None:
    """The first batch of an evaluator's own split, as it is read, in place of 50,000 images."""
    evaluator = dataclasses.replace(evaluator, batch_size=2)
    if hasattr(evaluator, "classifier"):
        return  # measured by a run that would be trained first: tests/evaluators/test_evaluators.py
    if hasattr(evaluator, "split"):
        Evaluator.check(evaluator, name, run)
        images = data_of(run, getattr(evaluator, "data", {}), name)
        context = Context(name, run, Path(), RunHelpers(run))
        batch = next(iter(evaluator.batches(context, evaluator.split, images)))
        assert batch["image"].shape == (2, *run.image_shape)


def test_every_recipe_is_here() -> None:
    assert SMALLEST.keys() <= set(RECIPES) and MORE.keys() <= set(RECIPES)
    assert len(RECIPES) > 20


def test_worker_processes_read_what_threads_read(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe with the most augmentation, through a process as on a pod: the same batches."""
    monkeypatch.chdir(layout)
    found = []
    for workers in (0, 1):
        cfg = small("swin", layout, **{"data.workers": workers})
        run = build.build(cfg, jax.devices()[:1])
        batches = data.train_batches(cfg.data, 0, 0, run.batch_sharding())
        found.append([np.asarray(next(batches)["image"]) for _ in range(3)])
        batches.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found[0], found[1])


def test_vilts_retrieval_goes_on_from_its_pre_training(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of configs/vilt.py: its head starts as the logit of a match (Kim et al. 2021's code)."""
    monkeypatch.chdir(layout)
    first = build.build(small("vilt", layout), jax.devices()[:1])
    shapes = state.abstract(first).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    create_run_from_weights(first, {"params": params}, layout / "runs/vilt_b32", "a test")
    recipe = (ROOT / "configs/vilt.py").read_text()
    flags = recipe.partition("go on by\n")[2].partition('"""')[0].split("--config.")[1:]
    given = dict(flag.strip().replace('"', "").split("=", 1) for flag in flags)
    given.pop("data.batch_size"), given.update({"model.tasks": ("retrieval",)})
    cfg = small("vilt", layout, **{k: _number(v) for k, v in given.items()})
    run = build.build(cfg, jax.devices()[:1])
    begun, _, said = warm_start.initial_state(run)
    weights = restore.restore_run(layout / "runs/vilt_b32").weights["params"]
    np.testing.assert_array_equal(begun.params["retrieval"]["kernel"], weights["itm"]["kernel"][:, 1:])
    np.testing.assert_array_equal(begun.params["retrieval"]["bias"], weights["itm"]["bias"][1:])
    np.testing.assert_array_equal(begun.params["word"]["embedding"], weights["word"]["embedding"])
    assert "itm" not in begun.params and "new are" not in said


def _number(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def test_vivits_recipe_starts_from_a_vit(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout)
    vit = build.build(small("vit", layout), jax.devices()[:1])
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), state.abstract(vit).params)
    create_run_from_weights(vit, {"params": params}, layout / "runs/vit_b16", "a test")
    cfg = small("vivit", layout, **{"train.init_from": "runs/vit_b16", "data.batch_size": 8})
    begun, _, said = warm_start.initial_state(build.build(cfg))
    assert said.startswith("starts from runs/vit_b16 at step 0") and begun.params


def test_a_recipe_trains_by_its_command(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet's ResNet through the command line, evaluated on the whole split, 5 images in batches of 8."""
    monkeypatch.chdir(layout)
    command = [
        "train", "--config=configs/resnet.py:A", f"--workdir={tmp_path / 'run'}", "--config.data.workers=0",
        f"--config.data.data_dir={layout / 'tfds'}", "--config.data.batch_size=8",
        "--config.train.duration=2 steps", "--config.optimizer.lr_milestones=('1 steps',)",
        "--config.evaluators.val.every=100 %", "--config.evaluators.val.batch_size=8",
        "--config.checkpoint.every=100 %", "--config.data.image_size=64",
    ]  # fmt: skip
    assert main(command) == 0
    (event,) = [e for e in loop.read_events(tmp_path / "run") if e["event"] == "evaluate"]
    assert event["values"].keys() == {"val_loss", "val_top1", "val_top1_se", "val_top5", "val_top5_se"}
