"""The one place where the bytes of an image file become pixels, as a viewer shows them."""

import io
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for pixels of that many channels
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16 bits, all of them grey
PNG = b"\x89PNG\r\n\x1a\n"

# The transpose that turns a picture upright, by the value of EXIF's tag 274, Orientation (CIPA DC-008).
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,  # anticlockwise
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Errors that Pillow raises for files that are broken, or no images.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, RuntimeError, struct.error)


def decode_image(raw: bytes, channels: int = 3, upright: bool = True) -> np.ndarray:
    """Decodes an image file to uint8 [H, W, channels]: 1 is grey, 3 is RGB, 4 is RGBA.

    The picture is turned as its EXIF orientation says (if `upright`), and values of 16 bits are scaled to 8.
    Transparent pixels, which may hide any colour, become white, as in the OpenMoji drawings; RGBA keeps its
    alpha instead. Only the first frame of an animation is decoded.

    Raises:
        ValueError: if the bytes are not a complete image, or their pixels have no known range; the message
            is one line.
    """
    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            picture = _to_eight_bits(image, raw)
            if channels != 4 and picture.has_transparency_data:
                picture = _on_white(picture)
            turn = TURNS.get(_orientation(image)) if upright else None
            picture = picture.convert(MODES[channels])
            pixels = np.asarray(picture if turn is None else picture.transpose(turn))
    except (*BROKEN, Image.DecompressionBombError) as e:
        reason = str(e).partition("\n")[0].split(" <")[0]  # without the object that Pillow names
        raise ValueError(reason or type(e).__name__) from None
    return pixels if channels > 1 else pixels[..., None]


def _orientation(image: Image.Image) -> Any:
    """Returns the EXIF orientation: 1, upright, if there is none or the EXIF data cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*BROKEN, TypeError, ZeroDivisionError):
        return 1  # damaged metadata does not spoil a picture, nor does it where Pillow reads the resolution


def _to_eight_bits(image: Image.Image, raw: bytes) -> Image.Image:
    """Returns the picture in a mode of 8 bits per channel, with its transparent colour scaled alike.

    Pillow's own `convert` clips 16 bits to white, and recognises a transparent colour only if it is given
    at 8 bits per channel.
    """
    key = image.info.get("transparency")
    if image.mode in DEEP or (image.mode == "I" and image.format in ("PNG", "PPM")):  # older Pillows say "I"
        values = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
        if key is not None:
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return grey
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, Pillow's mode {image.mode}, have no known range")
    depth = raw[24] if raw.startswith(PNG) else 8  # bits per channel
    if key is not None and image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif key is not None and image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # Pillow keeps only the high bytes
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Returns the picture composited onto a white background."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
