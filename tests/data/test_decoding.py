"""Image files of every kind become the pixels that a viewer shows."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, features

from scaling.data.decoding import decode_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(NOISE), kind, exif=exif)


def png(depth: int, colour: int, width: int, rows: list[bytes], key: bytes = b"") -> bytes:
    """A PNG file with any bits of a channel and colour type; `key` is the colour that is transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    return b"".join((
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"tRNS", key) if key else b"",
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b""),
    ))  # fmt: skip


# Where the first row and the first column of the file are to be seen, as CIPA DC-008 defines the values.
SEEN = {
    1: lambda x: x,  # top, left
    2: lambda x: x[:, ::-1],  # top, right
    3: lambda x: x[::-1, ::-1],  # bottom, right
    4: lambda x: x[::-1],  # bottom, left
    5: lambda x: x.swapaxes(0, 1),  # left, top
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda x: x.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", SEEN)
def test_exif_orientation(orientation: int) -> None:
    np.testing.assert_array_equal(decode_image(turned(orientation)), SEEN[orientation](NOISE))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_in_every_container(kind: str) -> None:
    assert decode_image(turned(6, kind)).shape == (9, 6, 3)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_there_is_not_changes_nothing(orientation: int) -> None:
    np.testing.assert_array_equal(decode_image(turned(orientation)), NOISE)


def test_damaged_exif_does_not_spoil_a_picture() -> None:
    raw = encoded(Image.fromarray(NOISE), exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(decode_image(raw), NOISE)


def test_sixteen_bits_are_scaled() -> None:
    ramp = np.arange(65536).reshape(256, 256).astype(np.uint16)
    found = decode_image(encoded(Image.fromarray(ramp)))
    assert found.shape == (256, 256, 3) and (found == found[..., :1]).all()
    np.testing.assert_array_equal(found[..., 0], np.round(ramp / 257).astype(np.uint8))
    assert found[..., 0].mean() == pytest.approx(127.5)


def test_sixteen_bits_of_any_channels_are_scaled() -> None:
    pixel = (0x1234, 0x8090, 0xFEDC)
    rows = {0: pixel[:1], 2: pixel, 4: (pixel[0], 0xFFFF), 6: (*pixel, 0xFFFF)}
    for colour, values in rows.items():
        raw = png(16, colour, 1, [struct.pack(f">{len(values)}H", *values)])
        expected = [value >> 8 for value in (pixel if colour in (2, 6) else 3 * pixel[:1])]
        assert np.abs(decode_image(raw)[0, 0].astype(int) - expected).max() <= 1


def test_a_colour_hidden_under_transparency_is_not_seen() -> None:
    hidden = np.dstack([NOISE, np.zeros((6, 9), np.uint8)])
    hidden[:3, ..., 3] = 255
    expected = NOISE.copy()
    expected[3:] = 255
    rgba = Image.fromarray(hidden)
    assert rgba.mode == "RGBA"
    np.testing.assert_array_equal(decode_image(encoded(rgba)), expected)
    np.testing.assert_array_equal(decode_image(encoded(rgba, "WEBP", lossless=True, exact=True)), expected)
    grey = decode_image(encoded(rgba.convert("LA")))
    np.testing.assert_array_equal(grey[:3, ..., 0], np.asarray(Image.fromarray(NOISE).convert("L"))[:3])
    assert (grey[3:] == 255).all()
    np.testing.assert_array_equal(decode_image(encoded(rgba), 4), hidden)  # who asks for alpha, gets it


def test_half_a_transparency_is_mixed_with_white() -> None:
    raw = encoded(Image.new("RGBA", (2, 2), (100, 0, 200, 128)))
    np.testing.assert_allclose(decode_image(raw)[0, 0], [177, 127, 227], atol=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_not_seen(kind: str) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 30, 40, 10, 20, 250])
    picture.putdata([0, 1])
    found = decode_image(encoded(picture, kind, transparency=0))
    assert found.tolist() == [[[255, 255, 255], [10, 20, 250]]]
    if kind == "PNG":
        found = decode_image(encoded(picture, kind, transparency=bytes([255, 0])))
        assert found.tolist() == [[[200, 30, 40], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (png(8, 0, 2, [bytes([90, 40])], struct.pack(">H", 90)), [255, 40]),
        (png(1, 0, 2, [bytes([0b01000000])], struct.pack(">H", 1)), [0, 255]),
        (png(4, 0, 2, [bytes([0x5A])], struct.pack(">H", 5)), [255, 170]),
        (png(2, 0, 2, [bytes([0b01100000])], struct.pack(">H", 2)), [85, 255]),
        (png(16, 0, 2, [struct.pack(">2H", 1000, 1001)], struct.pack(">H", 1000)), [255, 4]),
        (png(8, 2, 2, [bytes([7, 7, 7, 9, 9, 9])], struct.pack(">3H", 7, 7, 7)), [255, 9]),
        (png(16, 2, 2, [struct.pack(">6H", *3 * [1000], *3 * [9000])], struct.pack(">3H", *3 * [1000])),
         [255, 35]),
    ],
    ids=["grey 8", "grey 1", "grey 4", "grey 2", "grey 16", "rgb 8", "rgb 16"],
)  # fmt: skip
def test_a_transparent_colour_is_not_seen_at_any_depth(raw: bytes, expected: list[int]) -> None:
    assert decode_image(raw)[0].tolist() == [[value] * 3 for value in expected]


def test_other_modes() -> None:
    black_and_white = Image.fromarray(NOISE).convert("1")
    assert set(decode_image(encoded(black_and_white)).ravel().tolist()) == {0, 255}
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(decode_image(encoded(flat, "JPEG", quality=100))[0, 0] - [0.0, 255, 255]).max() < 8
    frames = [Image.new("RGB", (4, 4), (shade, shade, shade)) for shade in (10, 90)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {} if kind == "GIF" else {"lossless": True}
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(raw) == 10).all()


def test_grey_pictures_have_one_channel() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    raw = encoded(Image.fromarray(NOISE), exif=exif)
    found = decode_image(raw, 1)
    assert found.shape == (9, 6, 1)
    np.testing.assert_array_equal(found[..., 0], SEEN[8](np.asarray(Image.fromarray(NOISE).convert("L"))))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"no picture", "cannot identify image file"),
        (encoded(Image.fromarray(NOISE))[:80], "."),
        (
            encoded(Image.fromarray(NOISE.astype(np.float32)[..., 0]), "TIFF"),
            "32 bits.* F, have no known range",
        ),
        (
            encoded(Image.fromarray(NOISE.astype(np.int32)[..., 0]), "TIFF"),
            "32 bits.* I, have no known range",
        ),
    ],
    ids=["none", "cut", "float", "int32"],
)
def test_what_is_no_picture_is_said_in_one_line(raw: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        decode_image(raw)
    assert "\n" not in str(error.value) and "<" not in str(error.value)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damage_of_every_kind_is_no_traceback() -> None:
    """Of AVIF's decoder, which has errors of its own, at every third byte."""
    raw, broken = encoded(Image.fromarray(NOISE), "AVIF"), 0
    for place in range(0, len(raw), 3):
        damaged = raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]
        try:
            decode_image(damaged)
        except ValueError as e:
            broken += 1
            assert "\n" not in str(e)
    assert broken > 20


KINDS = {kind: encoded(Image.fromarray(NOISE), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")}


# Pillow warns of what it can still show.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.tuples(st.integers(0, 800), st.integers(0, 255)), max_size=4))
@settings(max_examples=150)
def test_a_damaged_picture_is_pixels_or_no_picture(kind: str, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(KINDS[kind])
    for place, value in changes:
        raw[place % len(raw)] = value
    try:
        found = decode_image(bytes(raw))
    except ValueError as e:
        assert str(e) and "\n" not in str(e) and raw != KINDS[kind]
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size
    if raw == KINDS[kind] or kind == "PNG":  # PNG alone has a checksum of its header, and of its pixels
        assert found.shape == NOISE.shape
