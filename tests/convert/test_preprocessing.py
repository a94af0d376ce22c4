"""What a checkpoint says of its images: read from its files, applied as its library does, written out."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from scaling.convert import FORMATS, preprocessing, stablehlo, transfer
from scaling.data.transforms import named
from scaling.errors import UserError
from scaling.models import swin, vit
from scaling.objectives.base import Extras
from scaling.preprocessing import IMAGENET, OPENAI, SYMMETRIC, Preprocessing
from scaling.run import restore
from scaling.run.options import Config
from scaling.training import config, loop
from tests.support import parity

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_vit.py")
PRETRAINED = str(ROOT / "configs/pretrained.py")
RNG = np.random.default_rng(0)
OTHER = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}


def photo(height: int, width: int) -> np.ndarray:
    """Smooth, so that kernels that differ in a rounding agree, and unlike in its channels."""
    y, x = np.mgrid[0:height, 0:width] / 25.0
    waves = [np.sin(x + 2 * y), np.cos(2 * x - y), np.sin(x * y / 3)]
    return (127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8)


def ours(seen: preprocessing.Seen, image: np.ndarray, side: int) -> np.ndarray:
    transform = seen.transform(side)
    cropped = image if transform is None else named(transform).apply(image, RNG, side)
    return np.asarray(seen.normalisation(jnp.asarray(cropped)))


PROCESSORS: dict[str, tuple[Any, int]] = {
    "vit": (ViTImageProcessorPil(size={"height": 24, "width": 24}, **OTHER), 24),
    "swin": (ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3, **OTHER), 24),
    "clip": (CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}), 24),
    "a share": (CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 26, "width": 26}), 26),
    "resnet": (ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, **OTHER), 28),
    "large": (ConvNextImageProcessorPil(size={"shortest_edge": 384}, **OTHER), 384),
    "no resizing": (ViTImageProcessorPil(do_resize=False, **OTHER), 0),
    "no normalisation": (ViTImageProcessorPil(do_resize=False, do_normalize=False), 0),
    "no rescaling": (
        ViTImageProcessorPil(do_resize=False, do_rescale=False, image_mean=[99, 90, 80], image_std=[9] * 3),
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(40, 57), (61, 45), (48, 48)])
def test_pixels_become_what_transformers_makes_of_them(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    processor, side = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    seen, image = preprocessing.read(tmp_path, "vit"), photo(*size)
    assert seen is not None and seen.source == "preprocessor_config.json"
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    out = ours(seen, image, side)
    assert out.shape == expected.shape
    # A corner of half a pixel is rounded down there and to the even one here; all else agrees.
    moved = [np.abs(np.roll(out, shift, (0, 1)) - expected)[2:-2, 2:-2].max() for shift in
             ((0, 0), (0, 1), (1, 0), (1, 1))]  # fmt: skip
    assert min(moved) < 0.02 * np.abs(expected).max()
    assert moved[0] < 0.02 * np.abs(expected).max() or name in ("clip", "a share", "resnet")


def stated(tmp_path: Path, file: str = preprocessing.FILE, **fields: Any) -> preprocessing.Seen | None:
    (tmp_path / file).write_text(json.dumps(fields))
    return preprocessing.read(tmp_path, "vit")


def test_older_files_say_a_size_by_their_kind(tmp_path: Path) -> None:
    old: dict[str, Any] = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    seen = stated(tmp_path, **old, feature_extractor_type="ViTFeatureExtractor", resample=2, size=224)
    assert seen is not None and seen.transform(224) == "resize(bilinear)" and seen.normalisation == SYMMETRIC
    seen = stated(
        tmp_path, **old, feature_extractor_type="CLIPFeatureExtractor", resample=3, size=224,
        do_center_crop=True, crop_size=224,
    )  # fmt: skip
    assert seen is not None and seen.transform(224) == "center_crop(224, bicubic)"
    assert seen.transform(448) == "center_crop(1, bicubic)"  # of another side, the same share
    kind = {"feature_extractor_type": "ConvNextFeatureExtractor"}
    seen = stated(tmp_path, **old, **kind, resample=3, size=224, crop_pct=0.875)
    assert seen is not None and seen.transform(224) == "center_crop(256, bicubic)"


def test_an_offset_is_part_of_the_mean(tmp_path: Path) -> None:
    """ViViT's processor: a pixel / 127.5 - 1, and then (if so said) less 0.5, by 0.5."""
    fields = {"do_resize": False, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 127.5,
              "offset": True, "image_processor_type": "VivitImageProcessor"}  # fmt: skip
    seen = stated(tmp_path, **fields, do_normalize=False)
    assert seen is not None and seen.normalisation == SYMMETRIC
    seen = stated(tmp_path, **fields, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert seen is not None and seen.normalisation == Preprocessing((0.75,), (0.25,))
    assert seen.normalisation.range() == (-3, 1)


def test_transformers_5_and_timm_say_it_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "five").mkdir()
    inner = {"do_resize": False, "do_normalize": True, "do_rescale": True, **OTHER}
    seen = stated(
        tmp_path / "five", "processor_config.json", image_processor=inner, processor_class="CLIPProcessor"
    )
    assert seen is not None and seen.normalisation == Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    (tmp_path / "timm").mkdir()
    given = dict(mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.9, interpolation="bicubic", crop_mode="center")
    seen = stated(tmp_path / "timm", "config.json", architecture="vit_base_patch16_224", pretrained_cfg=given)
    assert seen is not None and seen.normalisation == SYMMETRIC
    assert seen.transform(224) == "center_crop(0.9, bicubic)"
    seen = stated(
        tmp_path / "timm", "config.json", pretrained_cfg={**given, "crop_mode": "squash", "crop_pct": 1.0}
    )
    assert seen is not None and seen.transform(224) == "resize(bicubic)"
    assert preprocessing.read(tmp_path / "model.pt", "vit") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True: is not known here"),
        (
            {"do_center_crop": True, "do_resize": False},
            "do_resize=False: with do_center_crop=True images are cropped alone",
        ),
        (
            {"size": {"shortest_edge": 7}, "do_center_crop": True, "crop_size": 8},
            "crop_size=8: images of a short side of 7 would be padded",
        ),
        (
            {"feature_extractor_type": "XFeatureExtractor", "size": 8},
            "resample: is absent, and not known of XF",
        ),
        (
            {"image_processor_type": "XImageProcessor", "resample": 3, "size": 8, "crop_size": 8},
            "do_center_crop: is absent, and not known of XImageProcessor",
        ),
        (
            {"size": {"height": 9, "width": 9}, "do_center_crop": True, "crop_size": 8},
            "size=9: with crop_size=8 images are resized twice",
        ),
        ({"size": 8, "resample": 9}, r"resample=9: must be one of 0 \(nearest\), 1 \(lanczos\), 2"),
        ({"size": 8, "image_std": [0.0, 1.0, 1.0]}, r"std=.*: must be one number greater than 0"),
        ({"size": "large"}, r"cannot be read \(TypeError"),
    ],
)
def test_what_no_run_does_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: {message}"):
        stated(tmp_path, **{"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **fields})


@pytest.mark.parametrize("name", preprocessing.KINDS)
def test_what_a_file_leaves_out_is_what_its_processor_takes(name: str, tmp_path: Path) -> None:
    """Each field taken out in turn, and all: as where the library's own processor writes them all."""
    there = [name + end for end in ("ImageProcessorPil", "ImageProcessor")]
    cls = next(getattr(transformers, each) for each in there if hasattr(transformers, each))
    whole = json.loads(json.dumps(cls().to_dict()))
    keys = [key for key in preprocessing.READ.split() if not key.endswith("_type")]
    deciding = {key: whole[key] for key in keys if whole.get(key) is not None}
    kind = {"image_processor_type": f"{name}ImageProcessor"}
    of = stated(tmp_path, **deciding, **kind)
    assert of is not None and stated(tmp_path, **kind) == of
    assert {"image_mean", "size", "resample"} <= deciding.keys()
    for key in deciding:
        assert stated(tmp_path, **{k: v for k, v in deciding.items() if k != key}, **kind) == of, key
    family = next(family for family, its in preprocessing.KIND_OF.items() if its == name)
    (tmp_path / preprocessing.FILE).write_text("{}")
    assert preprocessing.read(tmp_path, family) == of


def test_a_rectangle_is_said(tmp_path: Path) -> None:
    seen = stated(tmp_path, size={"height": 8, "width": 12}, image_mean=0.4, image_std=0.2)
    assert seen is not None and seen.transform(12) is None and seen.normalisation.mean == (0.4,)
    assert seen.notes[0].startswith("images become size={'height': 8, 'width': 12} in this format")


def test_what_is_usual_where_files_do_not_say() -> None:
    def usual(format: str, model: Any, family: str) -> tuple[Preprocessing, str | None]:
        seen = FORMATS[format].families[family].preprocessing(model)
        return seen.normalisation, seen.transform(224)

    small = swin.make("T")
    assert usual("torchvision", None, "resnet") == (IMAGENET, "center_crop(0.875, bilinear)")
    assert usual("huggingface", None, "resnet") == (IMAGENET, "center_crop(0.875, bicubic)")
    assert usual("huggingface", None, "vit") == (SYMMETRIC, "resize(bilinear)")
    assert usual("huggingface", small, "swin") == (IMAGENET, "resize(bicubic)")
    assert usual("microsoft", small, "swin") == (IMAGENET, "center_crop(0.875, bicubic)")
    assert usual("microsoft", swin.make("B", resolution=384), "swin") == (IMAGENET, "resize(bicubic)")
    assert usual("timm", vit.make("B/16"), "vit") == (SYMMETRIC, "center_crop(0.9, bicubic)")
    assert usual("timm", small, "swin") == (IMAGENET, "center_crop(0.9, bicubic)")
    for format in ("openai", "huggingface"):
        assert usual(format, None, "clip") == (OPENAI, "center_crop(1, bicubic)")
    assert usual("huggingface", None, "timesformer")[0] == Preprocessing((0.45,), (0.225,))


# Through a run and out again


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config's model with normalisation of its own: a gray image's, as its processor has it."""
    options = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64, image_size=8, patch_size=4, num_channels=1,
                                     num_labels=10)  # fmt: skip
    model = transformers.ViTForImageClassification(options)
    parity.randomise(model)
    folder = tmp_path_factory.mktemp("outside")
    model.save_pretrained(folder)
    ViTImageProcessorPil(
        image_mean=[0.1], image_std=[0.3], do_resize=True, size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    return folder


def cfg(*more: str) -> Config:
    return config.load(TINY, ["model.epsilon=1e-12", "train.duration=4 steps", *more])


def test_it_stands_in_the_run_and_is_applied_and_written_out(outside: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = transfer.import_run("huggingface", outside, cfg(), run)
    assert said == ["preprocessing.mean=(0.1,), preprocessing.std=(0.3,): by preprocessor_config.json"]
    written = json.loads((run / "config.json").read_text())
    assert written["config"]["preprocessing"] == {"mean": [0.1], "std": [0.3]}
    assert written["imported"]["set"] == {
        "preprocessing.mean": [[0.5], [0.1]], "preprocessing.std": [[0.5], [0.3]]
    }  # fmt: skip

    # Features and logits of raw pixels are transformers' own, by its own processor.
    trained = restore.restore_run(run)
    x = RNG.integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    reference = transformers.ViTForImageClassification.from_pretrained(outside, local_files_only=True).eval()
    processor = ViTImageProcessorPil.from_pretrained(outside)
    values = [
        processor(each, input_data_format="channels_last", return_tensors="pt")["pixel_values"] for each in x
    ]
    expected = [reference(value).logits.detach().numpy()[0] for value in values]
    objective: Any = trained.run.objective
    extras = Extras(collections=trained.weights["collections"])
    out = objective.logits(trained.weights["params"], extras, {"image": jnp.asarray(x)})
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-3, atol=1e-3)

    assert transfer.export_run("huggingface", run, tmp_path / "back") == []
    again = preprocessing.read(tmp_path / "back", "vit")
    assert again is not None and again.normalisation == Preprocessing((0.1,), (0.3,))
    stablehlo.export_function(run, tmp_path / "function")
    card = json.loads((tmp_path / "function/model.json").read_text())["preprocessing"]
    assert (card["mean"], card["std"], card["argument"]) == ([0.1], [0.3], "images")
    assert card["range"] == pytest.approx([-1 / 3, 3.0])


def test_training_goes_on_with_what_the_weights_saw(outside: Path, tmp_path: Path) -> None:
    """By the command that the README gives: a config file's own defaults are not another run's."""
    run = tmp_path / "run"
    transfer.import_run("huggingface", outside, cfg(), run)
    loop.train(cfg(), run)
    assert restore.restore_run(run).step == 4
    written = json.loads((run / "config.json").read_text())
    assert written["config"]["preprocessing"]["mean"] == [0.1] and "imported" in written
    with pytest.raises(UserError, match=r"holds a run with preprocessing\.mean=\(0\.1,\), not \(0\.2,\)"):
        loop.train(cfg("preprocessing.mean=(0.2,)"), run)


def test_what_is_given_by_hand_stays_and_is_said(outside: Path, tmp_path: Path) -> None:
    given = cfg("preprocessing.mean=(0.2,)")
    said = transfer.import_run("huggingface", outside, given, tmp_path / "run", kept=["preprocessing.mean"])
    assert said == [
        "preprocessing.mean=(0.2,) as given, where preprocessor_config.json has (0.1,)",
        "preprocessing.std=(0.3,): by preprocessor_config.json",
    ]
    assert restore.restore_run(tmp_path / "run").run.config.preprocessing == Preprocessing((0.2,), (0.3,))


def test_a_run_that_crops_is_evaluated_as_the_weights_were(outside: Path, tmp_path: Path) -> None:
    crops = [
        "data.image_size=8",
        "data.train_transforms=('random_resized_crop',)",
        "data.eval_transforms=('center_crop',)",
    ]
    said = transfer.import_run("huggingface", outside, cfg(*crops), tmp_path / "run")
    assert said[0].endswith("data.eval_transforms=('resize(bilinear)',): by preprocessor_config.json")
    data = restore.restore_run(tmp_path / "run").run.config.data
    assert data.eval_transforms == ("resize(bilinear)",) and data.train_transforms == ("random_resized_crop",)
    transfer.export_run("huggingface", tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert written["size"] == {"height": 8, "width": 8} and written["resample"] == 2 and written["do_resize"]


@pytest.mark.parametrize(
    ("transforms", "fields", "said"),
    [
        (("center_crop",), {"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}, 0),
        (("center_crop(0.5, nearest)",), {"size": {"shortest_edge": 16}, "resample": 0}, 0),
        (("adm_crop",), {"do_resize": False}, 1),
    ],
)
def test_what_a_run_sees_is_written_for_transformers(
    transforms: tuple[str, ...], fields: dict[str, Any], said: int
) -> None:
    chosen = cfg(
        "data.image_size=8", f"data.train_transforms={transforms}", f"data.eval_transforms={transforms}"
    )
    written, lines = preprocessing.described(chosen, (8, 8, 1))
    assert fields.items() <= written.items()
    assert len(lines) == said and written["image_mean"] == [0.5]
    assert (
        preprocessing.described(chosen, (4, 8, 8, 3))[0]["image_processor_type"] == "VideoMAEImageProcessor"
    )


def test_an_exported_processor_opens_and_gives_the_same(tmp_path: Path) -> None:
    chosen = cfg(
        "data.image_size=8", "data.train_transforms=('center_crop',)", "data.eval_transforms=('center_crop',)"
    )
    written, _ = preprocessing.described(chosen, (8, 8, 3))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    opened = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = photo(30, 30)
    theirs = opened(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    seen = preprocessing.read(tmp_path, "vit")
    assert seen is not None
    np.testing.assert_allclose(ours(seen, image, 8), theirs, atol=0.02)
    video = preprocessing.described(chosen, (4, 8, 8, 3))[0]
    assert (
        VideoMAEImageProcessorPil(**{k: v for k, v in video.items() if k != "image_processor_type"})
        is not None
    )


def test_frozen_weights_know_their_images_too(tmp_path: Path) -> None:
    """configs/pretrained.py has no data: what the weights see stands in the run, its card and exports."""
    small = {
        "width": 16,
        "depth": 1,
        "heads": 2,
        "patch": 4,
        "resolution": 12,
        "num_classes": 3,
        "epsilon": 1e-12,
    }
    options = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4,
                                     intermediate_size=64, image_size=12, num_labels=3)  # fmt: skip
    transformers.ViTForImageClassification(options).save_pretrained(tmp_path / "source")
    overrides = {f"model.{key}": value for key, value in small.items()}
    chosen = config.load(f"{PRETRAINED}:vit/B/16", overrides)
    said = transfer.import_run("huggingface", tmp_path / "source", chosen, tmp_path / "run")
    assert said == [
        "data.image_size=12, data.train_transforms=('resize(bilinear)',), "
        "data.eval_transforms=('resize(bilinear)',): by what is usual for transformers' ViT, since "
        "its files do not say"
    ]
    stablehlo.export_function(tmp_path / "run", tmp_path / "function")
    card = json.loads((tmp_path / "function/model.json").read_text())["preprocessing"]
    assert (
        card["transforms"] == ["resize(bilinear)"] and card["size"] == [12, 12] and card["range"] == [-1, 1]
    )
    transfer.export_run("timm", tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert written["size"] == {"height": 12, "width": 12} and written["image_mean"] == [0.5] * 3


def test_channels_that_a_kind_does_not_have_are_said(outside: Path, tmp_path: Path) -> None:
    """Weights for gray images in a format whose usual normalisation is of three channels."""
    seen = preprocessing.usual("torchvision's first weights", IMAGENET, short=0.875)
    changes, said = preprocessing.changes(seen, cfg(), (8, 8, 1))
    assert changes == {} and len(said) == 1
    assert said[0].startswith(
        "preprocessing: stays (pixel / 255 - (0.5,)) / (0.5,); what is usual for torchvision"
    )


def test_no_square_is_made_of_what_a_rectangular_model_sees(outside: Path) -> None:
    seen = preprocessing.read(outside, "vit")
    assert seen is not None
    frozen = config.load(f"{PRETRAINED}:vit/B/16", {"model.resolution": [12, 20]})
    changes, said = preprocessing.changes(seen, frozen, (12, 20, 1))
    assert changes.keys() == {"preprocessing.mean", "preprocessing.std"}
    assert said[0].startswith("preprocessing: resize(bilinear) is left out, as it gives squares")
    written, _ = preprocessing.described(frozen, (12, 20, 1))
    assert written["do_resize"] is False and "size" not in written
