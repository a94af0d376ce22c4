"""RandAugment's operations by their amounts, and random erasing by its boxes."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from scaling.data import augment
from scaling.data.augment import APPLY, AUTOAUGMENT, INCREASING, Policy, rand_augment, with_pillow
from scaling.data.transforms import TRANSFORMS, generators

POLICIES = {"randaugment": AUTOAUGMENT, "randaugment_deit": INCREASING}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def applied(name: str, amount: float, image: np.ndarray, policy: Policy = AUTOAUGMENT) -> np.ndarray:
    return with_pillow(image, lambda picture: APPLY[name](picture, amount, policy.fill))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_works_at_every_magnitude(policy: Policy, channels: int) -> None:
    image = noise(12, 15, channels)
    for name, amount in policy.amounts.items():
        for tenths in range(101):
            for sign in (-1, 1):
                if name != "cutout":
                    made = applied(name, amount(tenths / 100, sign), image, policy)
                    assert made.shape == image.shape and made.dtype == np.uint8, name


@pytest.mark.parametrize("name", POLICIES)
def test_batches_of_the_recipes_size_are_augmented(name: str) -> None:
    """With their own operations: of 2,048 images some draw every one at the greatest magnitude."""
    image = noise(8, 8, 3)
    changed = [TRANSFORMS[name].apply(image, rng, 0) for rng in generators(0, np.arange(2048))]
    assert all(made.shape == image.shape and made.dtype == np.uint8 for made in changed)
    black = sum(not made.any() for made in changed)
    assert (black > 0) == (name == "randaugment_deit")  # posterized to no bits, at magnitude 10


# (operation, amount of "randaugment", of "randaugment_deit"), for a positive sign: at magnitudes 10 and 9
# what the released codes have. Factors of 1, a threshold of 256 and 8 bits change nothing.
AMOUNTS: list[tuple[str, float, float]] = [
    ("rotate", 30, 27),
    ("shear_x", 0.3, 0.27),
    ("shear_y", 0.3, 0.27),
    ("translate_x", 100 / 224, 0.405),
    ("translate_y", 100 / 224, 0.405),
    ("posterize", 4, 1),
    ("solarize", 256, 26),
    ("solarize_add", 110, 99),
    ("color", 1.9, 1.81),
    ("contrast", 1.9, 1.81),
    ("brightness", 1.9, 1.81),
    ("sharpness", 1.9, 1.81),
]


@pytest.mark.parametrize(("name", "ten", "nine"), AMOUNTS)
def test_amounts_are_the_released_ones(name: str, ten: float, nine: float) -> None:
    assert AUTOAUGMENT.amounts[name](1.0, 1) == pytest.approx(ten)
    assert INCREASING.amounts[name](0.9, 1) == pytest.approx(nine)
    signed = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    assert AUTOAUGMENT.amounts[name](1.0, -1) == pytest.approx(-ten if signed else ten)
    colours = {"color": 0.19, "contrast": 0.19, "brightness": 0.19, "sharpness": 0.19}
    assert INCREASING.amounts[name](0.9, -1) == pytest.approx(colours.get(name, -nine if signed else nine))


def test_the_policies_have_sixteen_and_fifteen_operations() -> None:
    assert set(AUTOAUGMENT.amounts) == {*APPLY, "cutout"} and set(INCREASING.amounts) == set(APPLY)
    assert (AUTOAUGMENT.count, AUTOAUGMENT.magnitude, AUTOAUGMENT.deviation, AUTOAUGMENT.chance) == (
        2,
        10,
        0,
        1,
    )
    assert (INCREASING.count, INCREASING.magnitude, INCREASING.deviation, INCREASING.chance) == (
        2,
        9,
        0.5,
        0.5,
    )


def test_operations_are_pillows() -> None:
    image = noise(9, 9, 3)
    picture = Image.fromarray(image)
    expected: dict[str, tuple[float, Any]] = {
        "autocontrast": (0, ImageOps.autocontrast(picture)),
        "equalize": (0, ImageOps.equalize(picture)),
        "posterize": (3, ImageOps.posterize(picture, 3)),
        "solarize": (100, np.where(image < 100, image, 255 - image)),
        "solarize_add": (60, np.where(image < 128, np.minimum(image + 60.0, 255), image)),
        "invert": (0, 255 - image),
        "color": (0.3, ImageEnhance.Color(picture).enhance(0.3)),
        "brightness": (1.4, ImageEnhance.Brightness(picture).enhance(1.4)),
        "contrast": (1.4, ImageEnhance.Contrast(picture).enhance(1.4)),
        "sharpness": (1.4, ImageEnhance.Sharpness(picture).enhance(1.4)),
    }
    np.testing.assert_array_equal(expected["posterize"][1], image & 0b11100000)
    assert not applied("posterize", 0, image).any()
    np.testing.assert_array_equal(applied("posterize", 8, image), image)
    for name, (amount, result) in expected.items():
        np.testing.assert_array_equal(applied(name, amount, image), np.asarray(result), err_msg=name)


def test_geometry_moves_pixels_and_fills_what_is_beyond_the_border() -> None:
    image = noise(10, 10, 3)
    moved = applied("translate_x", 0.2, image)
    np.testing.assert_array_equal(moved[:, :8], image[:, 2:])
    assert (moved[:, 8:] == 128).all()
    moved = applied("translate_y", -0.3, image, INCREASING)
    np.testing.assert_array_equal(moved[3:], image[:7])
    assert (moved[:3] == (124, 116, 104)).all()
    np.testing.assert_array_equal(applied("rotate", 90, image), np.rot90(image))
    sheared = applied("shear_x", 0.5, image)
    np.testing.assert_array_equal(sheared[0], image[0])
    np.testing.assert_array_equal(sheared[4, :8], image[4, 2:])
    np.testing.assert_array_equal(applied("shear_y", 0.5, image)[:8, 4], image[2:, 4])
    gray = applied("translate_x", 0.5, noise(4, 4, 1), INCREASING)
    assert (gray[:, 2:] == 115).all()


@pytest.mark.parametrize(("name", "policy"), POLICIES.items(), ids=POLICIES)
def test_two_operations_are_drawn_evenly(name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, float]] = []

    def spy(operation: str) -> Any:
        def apply(picture: Image.Image, amount: float, fill: Any) -> Image.Image:
            done.append((operation, amount))
            return picture

        return apply

    def cutout(image: np.ndarray, *_: Any) -> np.ndarray:
        done.append(("cutout", 0.0))
        return image

    for operation in APPLY:
        monkeypatch.setitem(APPLY, operation, spy(operation))
    monkeypatch.setattr(augment, "_cutout", cutout)
    runs, image = 2000, noise(4, 4, 3)
    for rng in generators(0, np.arange(runs)):
        TRANSFORMS[name].apply(image, rng, 0)
    assert len(done) == pytest.approx(runs * policy.count * policy.chance, abs=0.05 * runs)
    each = len(done) / len(policy.amounts)
    counts = {operation: sum(o == operation for o, _ in done) for operation in policy.amounts}
    assert all(0.6 * each < count < 1.4 * each for count in counts.values()), counts
    degrees = np.array([amount for operation, amount in done if operation == "rotate"])
    assert 0.3 < (degrees > 0).mean() < 0.7
    levels = np.abs(degrees) / 3.0
    assert levels.mean() == pytest.approx(policy.magnitude, abs=0.2)
    assert levels.std() == pytest.approx(policy.deviation, abs=0.12) and levels.max() <= 10.0


def test_cutout_is_a_gray_box_around_a_pixel() -> None:
    policy = Policy({"cutout": AUTOAUGMENT.amounts["cutout"]}, AUTOAUGMENT.fill, magnitude=10.0, count=1)
    image = np.zeros((56, 56, 3), np.uint8)
    areas = []
    for rng in generators(0, np.arange(200)):
        cut = rand_augment(image, rng, 0, policy)[..., 0] == 128
        rows, columns = cut.any(1).sum(), cut.any(0).sum()
        assert cut.sum() == rows * columns and max(rows, columns) <= 20 and min(rows, columns) >= 10
        areas.append(cut.sum())
    assert max(areas) == 20 * 20 > np.median(areas) > min(areas)


def test_random_erasing_puts_noise_in_a_box_of_a_quarter_of_the_images() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    areas, ratios, values, untouched = [], [], [], 0
    for rng in generators(0, np.arange(2000)):
        erased = TRANSFORMS["random_erasing"].apply(image, rng, 0)
        changed = erased.any(-1)
        if erased is image:
            untouched += 1
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        areas.append(height * width / 64**2)
        ratios.append(height / width)
        values.append(erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean())
        assert changed.sum() > 0.98 * height * width
    assert untouched == pytest.approx(1500, abs=80)
    assert 0.015 < min(areas) < 0.03 and 0.3 < max(areas) < 0.35
    assert 0.25 < min(ratios) < 0.4 and 2.5 < max(ratios) < 3.9
    assert np.mean(values) == pytest.approx(127.5, abs=3.0)
    assert not image.any()
