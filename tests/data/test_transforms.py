"""Transforms: geometry against hand-made images, and randomness as a function of (seed, position)."""

import numpy as np
import pytest
from PIL import Image

from scaling.data.transforms import TRANSFORMS, generators, named, transform
from scaling.errors import UserError


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


FORMS = ["random_resized_crop(0.9)", "random_crop(1, bilinear)", "center_crop(18, nearest)", "resize(box)"]


@pytest.mark.parametrize("name", [*TRANSFORMS, *FORMS])
@pytest.mark.parametrize("shape", [(20, 31, 3), (45, 17, 1), (16, 16, 3), (7, 9, 1)])
def test_shapes_and_dtype(name: str, shape: tuple[int, int, int]) -> None:
    image = noise(*shape)
    before = image.copy()
    result = named(name).apply(image, rng(), 16)
    assert result.shape == ((16, 16, shape[2]) if named(name).sized else shape)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_only_random_transforms_draw() -> None:
    for name, entry in TRANSFORMS.items():
        generator = rng()
        state = generator.bit_generator.state
        entry.apply(noise(20, 20, 3), generator, 16)
        assert (generator.bit_generator.state != state) == entry.random, name


def test_flip_mirrors_half_of_the_images() -> None:
    image = noise(4, 5, 3)
    results = [TRANSFORMS["flip"].apply(image, generator, 0) for generator in generators(0, np.arange(400))]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert all(np.array_equal(r, image) or np.array_equal(r, image[:, ::-1]) for r in results)
    assert 160 < mirrored < 240


def test_pad_crop_reaches_every_shift_and_no_other() -> None:
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 4] = 255
    places = set()
    for generator in generators(0, np.arange(1000)):
        result = TRANSFORMS["pad_crop"].apply(image, generator, 0)
        places.add(tuple(np.argwhere(result[..., 0])[0].tolist()))
    assert places == {(y, x) for y in range(9) for x in range(9)}


def test_random_resized_crop_area_and_ratio() -> None:
    """On an image of coordinates, a crop's corners tell its box: 8–100 % of the area, ratio 3/4–4/3."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
    image = np.stack([y, x, x], axis=-1)
    areas, ratios = [], []
    for generator in generators(0, np.arange(300)):
        crop = TRANSFORMS["random_resized_crop"].apply(image, generator, 32).astype(float)
        # The middle half of the crop spans half of the box; edges are left out for the filter's sake.
        height, width = (crop[24, 16, 0] - crop[8, 16, 0]) * 2, (crop[16, 24, 1] - crop[16, 8, 1]) * 2
        areas.append(height * width / 200**2)
        ratios.append(width / height)
    assert 0.07 < min(areas) < 0.12
    assert 0.9 < max(areas) < 1.05
    assert 0.72 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.39


def test_center_crop_keeps_its_part_of_the_short_side() -> None:
    """A 0.875 crop of 256×320 at 224 is the plain central square: nothing is resized."""
    image = noise(256, 320, 3)
    np.testing.assert_array_equal(TRANSFORMS["center_crop"].apply(image, rng(), 224), image[16:240, 48:272])
    small = noise(40, 32, 3)
    np.testing.assert_array_equal(named("center_crop(1)").apply(small, rng(), 32), small[4:36])
    scaled = np.asarray(Image.fromarray(noise(64, 64, 3)).resize((53, 53), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        named("center_crop(0.9)").apply(noise(64, 64, 3), rng(), 48), scaled[2:50, 2:50]
    )
    bilinear = np.asarray(Image.fromarray(noise(64, 64, 3)).resize((60, 60), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        named("center_crop(60, bilinear)").apply(noise(64, 64, 3), rng(), 48), bilinear[6:54, 6:54]
    )


def torchvisions(height: int, width: int, short: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What its Resize makes of an image's sides, and the corner of its CenterCrop: written from its rules."""
    landscape, long = height <= width, int(short * max(height, width) / min(height, width))
    sides = (short, long) if landscape else (long, short)
    return sides, (round((sides[0] - size) / 2.0), round((sides[1] - size) / 2.0))


@pytest.mark.parametrize(("share", "short"), [("0.875", 32), ("1", 28), ("30", 30)])
def test_center_crop_is_torchvisions_to_the_pixel(share: str, short: int) -> None:
    """Of every size: pixels that hold their place tell what the sides became, and where the square lies."""
    crop = named(f"center_crop({share}, nearest)").apply
    for height in range(28, 60):
        for width in range(28, 60):
            rows, columns = np.mgrid[0:height, 0:width].astype(np.uint8)
            image = np.stack([rows, columns, columns], axis=-1)
            (h, w), (top, left) = torchvisions(height, width, short, 28)
            whole = Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST)
            expected = np.asarray(whole)[top : top + 28, left : left + 28]
            np.testing.assert_array_equal(crop(image, rng(), 28), expected, f"{height}x{width}")


def test_resize_keeps_all_of_the_image() -> None:
    image = noise(20, 30, 3)
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(named("resize(bilinear)").apply(image, rng(), 16), expected)


def test_a_random_box_is_cut_out_before_it_is_resized() -> None:
    """What lies beside the box does not show: where all of that is black, nothing of the crop is."""
    seen = 0
    for generator in generators(0, np.arange(50)):
        state = generator.bit_generator.state
        pixels = 1600 * generator.uniform(0.08, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if w > 40 or h > 40:
            continue
        top, left = int(generator.integers(40 - h + 1)), int(generator.integers(40 - w + 1))
        image = np.zeros((40, 40, 3), np.uint8)
        image[top : top + h, left : left + w] = 200
        generator.bit_generator.state = state
        assert (named("random_resized_crop").apply(image, generator, 32) == 200).all()
        seen += 1
    assert seen > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("centre_crop", r"^'centre_crop' is not a transform; choose from random_resized_crop, random_crop"),
        ("center_crop(", "is not a transform"),
        ("center_crop_90", r"^'center_crop_90' is now called 'center_crop\(0\.9\)'$"),
        ("center_crop(1.5)", r"'1\.5' is not what it takes: a share in \(0, 1\], or pixels; or one of near"),
        ("center_crop(0)", "'0' is not what it takes"),
        ("center_crop()", "'' is not what it takes"),
        ("center_crop(0.5, 0.6)", "has short twice"),
        ("random_resized_crop(3)", r"'3' is not what it takes: a share in \(0, 1\]; or one of"),
        ("resize(0.5)", r"'0\.5' is not what it takes: one of nearest"),
        ("flip(bilinear)", "'bilinear' is not what it takes: no arguments"),
    ],
)
def test_bad_names_and_arguments_are_said(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named(text)


def test_adm_crop_halves_with_a_box_filter_first() -> None:
    image = noise(64, 80, 3)  # one exact halving brings the short side to the size: pure 2×2 means
    means = image.reshape(32, 2, 40, 2, 3).astype(float).mean((1, 3))[:, 4:36]
    result = TRANSFORMS["adm_crop"].apply(image, rng(), 32)
    assert np.abs(result - means).max() <= 1.0  # Pillow rounds to 8 bits after each of the two directions
    # 63 is less than twice 32: no halving, one bicubic step.
    image = noise(63, 63, 3)
    bicubic = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(TRANSFORMS["adm_crop"].apply(image, rng(), 32), bicubic)


def test_draws_depend_on_seed_and_position_alone() -> None:
    def draws(seed: int, positions: list[int], used: int = 1) -> list[float]:
        return [generator.random(used)[0] for generator in generators(seed, np.array(positions))]

    together = draws(3, [0, 5, 2**40])
    assert together == [draws(3, [position], used=100)[0] for position in (0, 5, 2**40)]
    assert draws(3, [5, 0], used=7) == [together[1], together[0]]  # whatever was drawn before
    fresh = [np.random.Generator(np.random.Philox(key=(3, 1), counter=(0, 0, p, 0))).random() for p in (0, 5)]
    assert together[:2] == fresh
    assert len({*together, *draws(4, [0, 5, 2**40])}) == 6


def test_transform_applies_in_order() -> None:
    images = [noise(20, 30, 3)] * 3
    results = transform(images, ("flip", "pad_crop"), 0, 0, np.arange(3))
    for result, generator in zip(results, generators(0, np.arange(3)), strict=True):
        expected = TRANSFORMS["flip"].apply(images[0], generator, 0)
        np.testing.assert_array_equal(result, TRANSFORMS["pad_crop"].apply(expected, generator, 0))


def test_other_channels_than_pictures_have_are_named() -> None:
    with pytest.raises(UserError, match=r"an image of \(20, 20, 2\): transforms are of 1, 3 or 4 channels"):
        transform([noise(20, 20, 2)], ("center_crop",), 16, 0, np.arange(1))
