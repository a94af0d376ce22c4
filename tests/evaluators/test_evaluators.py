"""Measuring: every example once, distances by their own name, the same images whatever the batch."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scaling import data
from scaling.data.sources import arrays
from scaling.errors import UserError
from scaling.evaluators import Frechet, Grid, Metrics
from scaling.evaluators.classifier_features import ClassifierFeatures
from scaling.evaluators.features import reference_stats
from scaling.run import build, restore, state
from scaling.sampling import Sampling
from scaling.training import config, evaluate, loop
from tests.support.measuring import measured

Tiny = dict[str, str]
DIGITS = data.Data(name="digits", batch_size=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier's folder, and that of a diffusion run measured with it."""
    root = Path(__file__).parents[1]
    home = tmp_path_factory.mktemp("runs")
    classifier, run = home / "classifier", home / "run"
    source = home / "config.py"
    source.write_text(
        (root / "support/tiny_dit.py").read_text().replace(
            'checkpoint=dict(every="4 steps"),',
            f"""checkpoint=dict(every="12 steps"),
            evaluators=dict(
                fd=dict(name="frechet", classifier={str(classifier)!r},
                        classifier_config={str(root / "support/tiny_vit.py")!r}, every="6 steps", samples=160,
                        batch_size=80, sampling=dict(integrator="euler", steps=2)),
                grid=dict(name="grid", every="100 %", samples=9, batch_size=16,
                          sampling=dict(integrator="euler", steps=2)),
            ),""",
        )
    )  # fmt: skip
    loop.train(config.load(str(source)), run)
    return classifier, run


def test_the_classifier_is_trained_once_and_the_distance_bears_the_datas_name(
    folders: tuple[Path, Path],
) -> None:
    classifier, run = folders
    assert restore.restore_run(classifier).step == 8
    events = [e for e in loop.read_events(run) if e["event"] == "evaluate" and e["evaluator"] == "fd"]
    assert [e["step"] for e in events] == [6, 12]
    for event in events:
        assert event["values"].keys() == {"fd_digits", "fd_digits_se", "fd_digits_floor"}
        assert 0 < event["values"]["fd_digits_se"] < event["values"]["fd_digits"]
        assert event["values"]["fd_digits"] > event["values"]["fd_digits_floor"] > 0


def test_the_real_statistics_are_those_of_every_example(folders: tuple[Path, Path]) -> None:
    classifier, _ = folders
    found = ClassifierFeatures(classifier)
    source = data.open_source(DIGITS, "train")
    images, _ = source.read(np.arange(len(source))).values()
    parts = [found(jnp.asarray(images[i : i + 500])) for i in range(0, len(source), 500)]
    rows = np.concatenate([part.pooled for part in parts])
    assert parts[0].logits is not None and parts[0].logits.shape == (500, 10) and parts[0].maps is None
    (classifier / "features_train.npz").unlink(missing_ok=True)
    real = reference_stats(found, "train", DIGITS)
    np.testing.assert_allclose(real.mean, rows.mean(0), atol=1e-4)
    np.testing.assert_allclose(real.cov, np.cov(rows.T), atol=1e-4)
    again = reference_stats(ClassifierFeatures(classifier), "train", DIGITS)  # from the file that is left
    np.testing.assert_array_equal(again.cov, real.cov)


def test_other_images_than_the_classifiers_have_statistics_of_their_own(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    classifier, _ = folders
    found = ClassifierFeatures(classifier)
    own = reference_stats(found, "test", DIGITS)
    np.savez(
        tmp_path / "dark.npz",
        train_images=np.zeros((9, 8, 8, 1), np.uint8), train_labels=np.arange(9),
    )  # fmt: skip
    dark = data.Data(name="npz", data_dir=str(tmp_path / "dark.npz"))
    assert np.abs(reference_stats(found, "train", dark).cov).max() < 1e-6
    augmented = data.Data(
        name="digits", train_transforms=("flip",), batch_size=8
    )  # evaluation sees the same images
    np.testing.assert_array_equal(reference_stats(found, "test", augmented).cov, own.cov)
    names = {p.name for p in classifier.glob("features_test*")}
    assert names == {"features_test.npz"} and len(list(classifier.glob("features_train_*"))) == 1


def test_kept_statistics_know_their_classifier(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Those of other weights, of an older file that does not say, and damaged ones are measured again."""
    classifier, _ = folders
    found, path = ClassifierFeatures(classifier), classifier / "features_test.npz"
    own = reference_stats(found, "test", DIGITS)
    of = str(np.load(path)["of"])
    for change in {"of": np.array("other weights")}, {}, None:
        if change is None:
            path.write_bytes(path.read_bytes()[:100])
        else:
            np.savez(path, mean=own.mean + 1, cov=own.cov, floor=own.floor, **change)
        caplog.clear()
        np.testing.assert_array_equal(reference_stats(found, "test", DIGITS).mean, own.mean)
        (line,) = caplog.messages
        assert line.endswith("; it is measured again") and "\n" not in line
        caplog.clear()
        np.testing.assert_array_equal(reference_stats(found, "test", DIGITS).mean, own.mean)
        assert not caplog.messages
    assert str(np.load(path)["of"]) == of


def test_kept_statistics_know_their_images(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file by the same name with other images is measured again."""
    found, rng = ClassifierFeatures(folders[0]), np.random.default_rng(0)
    dark = data.Data(name="npz", data_dir=str(tmp_path / "images.npz"))
    for shade in (20, 200):
        arrays._npz.cache_clear()  # as in another process
        images = rng.integers(0, shade, (80, 8, 8, 1)).astype(np.uint8)
        np.savez(tmp_path / "images.npz", train_images=images, train_labels=np.arange(80) % 2)
        rows = found(jnp.asarray(images)).pooled
        np.testing.assert_allclose(reference_stats(found, "train", dark).mean, rows.mean(0), atol=1e-4)
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "is of other weights or images; it is measured again"
    ]


def test_a_classifier_that_was_trained_on_is_another(
    folders: tuple[Path, Path], tiny: dict[str, str], tmp_path: Path
) -> None:
    """In the same process, by the same folder: its features, and the statistics that are kept, are new."""
    classifier = tmp_path / "classifier"
    shutil.copytree(folders[0], classifier)
    first = reference_stats(ClassifierFeatures(classifier), "test", DIGITS)
    loop.train(config.load(tiny["vit"], ["train.duration=16 steps"]), classifier)
    after = reference_stats(ClassifierFeatures(classifier), "test", DIGITS)
    assert np.abs(after.mean - first.mean).max() > 1e-3


def test_too_few_samples_for_the_features_is_an_error(folders: tuple[Path, Path]) -> None:
    classifier, generator = folders
    run = restore.restore_run(generator).run
    few = Frechet(classifier=str(classifier), classifier_config="", samples=159)
    with pytest.raises(UserError, match=r"evaluators\.fd\.samples=159: .* at least 160"):
        few.check("fd", run)
    with pytest.raises(UserError, match=r"evaluators\.fd\.batch_size=81"):
        Frechet(classifier=str(classifier), classifier_config="", samples=160, batch_size=81).check("fd", run)


def test_tiles_of_pixels_are_refused_before_training(folders: tuple[Path, Path]) -> None:
    run = restore.restore_run(folders[1]).run
    said = r"evaluators\.grid\.sampling\.decode_tile=4: this run's samples are pixels; leave it out"
    with pytest.raises(UserError, match=said):
        Grid(sampling=Sampling(decode_tile=4)).check("grid", run)


def test_a_classifier_cannot_be_sampled(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective classification"):
        evaluate.sample(folders[0], tmp_path / "grid.png", None, 4, 8, {})


def test_accuracy_counts_every_example_once(tiny: Tiny) -> None:
    """359 test digits in batches of 128: against one pass over the whole split by hand."""
    run = build.build(config.load(tiny["vit"]))
    weights = state.eval_weights(state.init(run))
    weights["params"]["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 10))
    source = data.open_source(run.config.data, "test")
    images, labels = source.read(np.arange(len(source))).values()
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    logits = jax.jit(run.model.apply)({"params": weights["params"]}, x)
    found = measured(Metrics(batch_size=128), "val", run, weights)
    assert found["val_top1"] == pytest.approx(float(np.mean(np.argmax(logits, -1) == labels)), abs=1e-6)
    order = np.argsort(-np.asarray(logits), axis=-1)[:, :5]
    assert found["val_top5"] == pytest.approx(float(np.mean((order == labels[:, None]).any(-1))), abs=1e-6)
    log_p = jax.nn.log_softmax(logits)[np.arange(len(labels)), labels]
    assert found["val_loss"] == pytest.approx(float(-log_p.mean()), rel=1e-5)


def test_samples_are_fixed_by_the_seed_whatever_the_batch(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = folders
    made = {}
    for name, batch, options in (
        ("a", 8, {}),
        ("b", 24, {}),
        ("c", 8, {"seed": 1}),
        ("d", 8, {"guidance_scale": 3.0}),
    ):
        evaluate.sample(run, tmp_path / f"{name}.png", tmp_path / f"{name}.npz", 20, batch, options)
        with np.load(tmp_path / f"{name}.npz") as arrays:
            made[name] = arrays["images"].astype(int)
            assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (20, 8, 8, 1)
            np.testing.assert_array_equal(arrays["labels"], np.arange(20) % 10)
    assert abs(made["a"] - made["b"]).max() <= 1  # float sums may round to the next integer
    assert (made["a"] != made["c"]).mean() > 0.5
    assert (made["a"] != made["d"]).any()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "L" and picture.size == (2 + 5 * 10, 2 + 4 * 10)


def test_the_grid_is_the_first_samples(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = folders
    evaluate.sample(run, tmp_path / "again.png", None, 9, 8, {})
    with Image.open(run / "samples/step_00000012.png") as a, Image.open(tmp_path / "again.png") as b:
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_evaluate_gives_what_training_logged(folders: tuple[Path, Path]) -> None:
    _, run = folders
    logged = {}
    for event in loop.read_events(run):
        if event["event"] == "evaluate":
            logged |= event["values"]
    assert evaluate.evaluate(run) == pytest.approx(logged, rel=1e-3)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run=.*: no config\.json there"):
        evaluate.evaluate(tmp_path)


def test_sampling_options_are_checked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampling\.steps=0"):
        evaluate.sample(folders[1], tmp_path / "a.png", None, 4, 8, {"steps": 0})
    with pytest.raises(UserError, match=r"samples=0"):
        evaluate.sample(folders[1], tmp_path / "a.png", None, 0, 8, {})
    assert Sampling(integrator="euler", steps=2) == restore.restore_run(folders[1]).run.config.sampling
