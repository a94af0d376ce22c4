"""Questions about drawings: what the names say, answers that need the text, sentences that need both."""

import numpy as np
import pytest

from scaling.data import Data, info, open_source
from scaling.data.sources.openmoji_questions import ANSWERS, PEOPLE, TONES, attributes
from scaling.data.text import Text


def data_of(name: str) -> Data:
    return Data(
        name=name, image_size=8, batch_size=8, text=Text(name="wordpiece", vocab_size=600, max_length=12)
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("woman running medium-dark skin tone", ("medium-dark", "woman")),
        ("man and woman holding hands", ()),
        ("couple with heart man man light skin tone dark skin tone", ("man",)),
        ("snowman", ()),
    ],
)
def test_what_a_name_says(name: str, shown: tuple[str, ...]) -> None:
    assert attributes(name) == shown


def test_answers_are_those_of_the_names() -> None:
    for split in ("train", "test"):
        source = open_source(data_of("openmoji_answers"), split).source  # type: ignore[attr-defined]
        names = open_source(data_of("openmoji"), split).source.names  # type: ignore[attr-defined]
        columns = source.read(np.arange(len(source)))
        questions = [texts[0] for texts in source.captions(np.arange(len(source)))]
        for row, question, label in zip(source.rows, questions, columns["label"], strict=True):
            answer = ANSWERS[label]
            assert answer in attributes(names[row])
            assert (answer in TONES) == (question == "what skin tone ?")
        drawn = open_source(data_of("openmoji"), split).read(source.rows[:20])["image"]
        np.testing.assert_array_equal(columns["image"][:20], drawn)
        twice = len(source.rows) - len(np.unique(source.rows))
        assert twice > 0.25 * len(source)  # the same drawing, another question, another answer
    facts = info(data_of("openmoji_answers"))
    assert facts.num_classes == 7 and facts.columns.keys() == {
        "image",
        "label",
        "text",
        "text_mask",
        "text_word",
    }


def test_a_sentence_is_true_of_both_or_of_one() -> None:
    source = open_source(data_of("openmoji_both"), "train").source  # type: ignore[attr-defined]
    names = open_source(data_of("openmoji"), "train").source.names  # type: ignore[attr-defined]
    columns = source.read(np.arange(len(source)))
    assert columns["image"].shape == (len(source), 2, 8, 8, 3) and source.image_shape == (2, 8, 8, 3)
    firsts = []
    for rows, (text,), label in zip(
        source.rows, source.captions(np.arange(len(source))), columns["label"], strict=True
    ):
        said = next(each for each in ANSWERS if f" a {each} " in f"{text} ")
        has = [said in attributes(names[row]) for row in rows]
        assert sum(has) == (2 if label else 1) and rows[0] != rows[1]
        assert ("skin tone" in text) == (said not in PEOPLE)
        if not label:
            firsts.append(has[0])
    assert columns["label"].mean() == pytest.approx(0.5, abs=0.05)
    assert np.mean(firsts) == pytest.approx(0.5, abs=0.07)  # where it is true of one, of either
