"""Questions about OpenMoji drawings, made from their names: about one, and sentences about two.

They show that the heads for answering and for paired reasoning learn; splits are those of `openmoji`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling.data.openmoji import TONES, openmoji, tone_of
from scaling.data.sources import Columns

if TYPE_CHECKING:
    from scaling.data.options import Data

PEOPLE = ("man", "woman")
ANSWERS = (*TONES, *PEOPLE)
_TONE, _PERSON = "what skin tone ?", "a man or a woman ?"


@dataclass(frozen=True)
class Asked:
    """Texts about drawings, each with its answer; held in memory."""

    name: str
    num_classes: int
    drawings: np.ndarray  # uint8 [D, S, S, 3]
    rows: np.ndarray  # int64 [N], which drawing each text is about, or [N, 2], which two
    texts: tuple[str, ...]
    labels: np.ndarray  # int32 [N]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[1:], *self.drawings.shape[1:])

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, indices: np.ndarray) -> Columns:
        return {"image": self.drawings[self.rows[indices]], "label": self.labels[indices]}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [(self.texts[index],) for index in indices.tolist()]


def openmoji_answers(data: "Data", split: str) -> Asked:
    """What skin tone, and a man or a woman? One answer of seven (`ANSWERS`) about one drawing.

    Many drawings are asked both, so that a drawing alone does not give the answer.
    """
    drawn = openmoji(data, split)
    asked = [
        (row, _TONE if shown in TONES else _PERSON, ANSWERS.index(shown))
        for row, name in enumerate(drawn.names)
        for shown in attributes(name)
    ]
    rows, texts, labels = zip(*asked, strict=True)
    return Asked(
        "openmoji_answers", len(ANSWERS), drawn.images, np.array(rows), texts, np.array(labels, np.int32)
    )


def openmoji_both(data: "Data", split: str) -> Asked:
    """Is a sentence, such as "both show a dark skin tone", true of two drawings? 1 if so, 0 if of one alone.

    Each drawing with something to say of it is one of a pair once, at random, the same on every machine; half
    of the sentences are true, but for chance.
    """
    drawn = openmoji(data, split)
    shown = [attributes(name) for name in drawn.names]
    having = {each: np.array([each in some for some in shown]) for each in ANSWERS}  # bool [D] each
    rng, asked = np.random.Generator(np.random.Philox(1)), []
    for row, mine in enumerate(shown):
        if not mine:
            continue
        said = mine[int(rng.integers(len(mine)))]
        true, first = rng.random(2) < 0.5
        fits = having[said] == true
        fits[row] = False
        other = int(rng.choice(np.flatnonzero(fits)))
        text = f"both show a {said} skin tone" if said in TONES else f"both show a {said}"
        asked.append(((row, other) if first else (other, row), text, int(true)))
    rows, texts, labels = zip(*asked, strict=True)
    return Asked("openmoji_both", 2, drawn.images, np.array(rows), texts, np.array(labels, np.int32))


def attributes(name: str) -> tuple[str, ...]:
    """What of `ANSWERS` a drawing of this name shows: its skin tone where it has one, and man or woman."""
    tone, people = tone_of(name), [person for person in PEOPLE if person in name.split()]
    return (*([tone] if tone else []), *(people if len(people) == 1 else []))
