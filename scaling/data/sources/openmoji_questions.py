"""Questions about one OpenMoji drawing and sentences about two, made from the drawings' names.

They show that the heads for question answering and for paired reasoning learn. The splits are those of
`openmoji`.
"""

from dataclasses import dataclass

import numpy as np

from scaling.data.sources.base import Columns
from scaling.data.sources.openmoji import TONES, openmoji, tone_of

PEOPLE = ("man", "woman")
ANSWERS = (*TONES, *PEOPLE)
_TONE, _PERSON = "what skin tone ?", "a man or a woman ?"


@dataclass(frozen=True)
class Asked:
    """A split of texts about drawings, each with its answer, held in memory."""

    name: str
    num_classes: int
    drawings: np.ndarray  # uint8 [D, S, S, 3]
    rows: np.ndarray  # int64 [N], the drawing that each text is about, or [N, 2], the two drawings
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


def openmoji_answers(size: int, split: str) -> Asked:
    """Returns the questions "what skin tone?" and "a man or a woman?", each about one drawing.

    There are seven answers (`ANSWERS`). Both questions are asked about many drawings, so that a drawing alone
    does not give the answer.
    """
    drawings = openmoji(size, split)
    questions = [
        (row, _TONE if attribute in TONES else _PERSON, ANSWERS.index(attribute))
        for row, name in enumerate(drawings.names)
        for attribute in attributes(name)
    ]
    rows, texts, labels = zip(*questions, strict=True)
    return Asked(
        "openmoji_answers", len(ANSWERS), drawings.images, np.array(rows), texts, np.array(labels, np.int32)
    )


def openmoji_both(size: int, split: str) -> Asked:
    """Returns sentences about two drawings, such as "both show a dark skin tone".

    The label is 1 if the sentence is true of both drawings, and 0 if of one alone. There is a sentence for
    each drawing that shows one of `ANSWERS`, with a random partner, the same on every machine. Each is true
    with probability 1/2.
    """
    drawings = openmoji(size, split)
    attributes_of = [attributes(name) for name in drawings.names]  # for each drawing
    has_attribute = {
        answer: np.array([answer in each for each in attributes_of]) for answer in ANSWERS
    }  # bool [D] each
    rng, questions = np.random.Generator(np.random.Philox(1)), []
    for row, candidates in enumerate(attributes_of):
        if not candidates:
            continue
        attribute = candidates[int(rng.integers(len(candidates)))]
        is_true, is_first = rng.random(2) < 0.5
        fits = has_attribute[attribute] == is_true
        fits[row] = False
        other = int(rng.choice(np.flatnonzero(fits)))
        text = f"both show a {attribute} skin tone" if attribute in TONES else f"both show a {attribute}"
        questions.append(((row, other) if is_first else (other, row), text, int(is_true)))
    rows, texts, labels = zip(*questions, strict=True)
    return Asked("openmoji_both", 2, drawings.images, np.array(rows), texts, np.array(labels, np.int32))


def attributes(name: str) -> tuple[str, ...]:
    """Returns those of `ANSWERS` that a drawing of this name shows: a skin tone, a man or a woman."""
    tone, people = tone_of(name), [person for person in PEOPLE if person in name.split()]
    return (*([tone] if tone else []), *(people if len(people) == 1 else []))
