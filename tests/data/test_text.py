"""Tokenizers: CLIP's, BERT's and T5's, from files, packages and captions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

from scaling.data.text import Text, _bytes, tokenizer
from scaling.errors import UserError

CAPTIONS = ["a red fox", "two red birds", "the fox's den", "a bird on a tree", "red tree and fox den"] * 3
BERT = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "fox",
    "##es",
    "un",
    "##af",
    "##able",
    ",",
    "!",
]
MERGES = ["r e", "re d</w>", "f o", "fo x</w>", "' s</w>", "b i", "bi r", "bir d</w>"]


def never() -> list[str]:
    raise AssertionError("the vocabulary is given")


def clip_file(folder: Path) -> Path:
    """A file of CLIP's form, with fewer merges."""
    path = folder / "bpe.txt"
    path.write_text("\n".join(['"bpe"', *MERGES]), encoding="utf-8")
    return path


def test_clip_agrees_with_the_reference(tmp_path: Path) -> None:
    """Ids of transformers' own tokenizer of the same merges, for caption-like strings of many kinds."""
    alphabet = _bytes()
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = tokenizer(Text(vocabulary=str(clip_file(tmp_path)), length=60), never)
    assert ours.info.vocabulary == len(tokens)
    for caption in (
        "A red  FOX",
        "the fox's bird, 42!",
        "café — naïve",
        "鳥 red",
        "fox\tred\nbird",
        "i'd re'd",
    ):
        found = ours([caption])
        assert found["text"][0][found["text_mask"][0]].tolist() == theirs(caption)["input_ids"]


def test_clip_mends_html_and_broken_encodings(tmp_path: Path) -> None:
    ours = tokenizer(Text(vocabulary=str(clip_file(tmp_path)), length=30), never)
    one, other = ours(["fox &amp;amp; bird", "fox & bird"])["text"]
    np.testing.assert_array_equal(one, other)
    one, other = ours(["cafÃ©", "café"])["text"]
    np.testing.assert_array_equal(one, other)


def test_clip_end_of_text_is_the_greatest_id() -> None:
    ours = tokenizer(Text(length=12), lambda: CAPTIONS)
    found = ours(CAPTIONS)
    assert (found["text"].max(axis=1) == ours.info.vocabulary - 1).all()
    assert (found["text"][:, 0] == ours.info.vocabulary - 2).all()


def test_wordpiece_agrees_with_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT))
    theirs = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    ours = tokenizer(Text(kind="wordpiece", vocabulary=str(path), length=12), never)
    captions = ["A red fox!", "unaffable foxes, red", "zebra Fóx", "a , a"]
    found = ours(captions)
    expected = theirs(captions, padding="max_length", max_length=12, truncation=True)
    np.testing.assert_array_equal(found["text"], expected["input_ids"])
    np.testing.assert_array_equal(found["text_mask"], np.array(expected["attention_mask"], bool))
    assert ours.info.mask == BERT.index("[MASK]")


def test_words_are_numbered_across_their_pieces(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT))
    found = tokenizer(Text(kind="wordpiece", vocabulary=str(path), length=8), never)(["a foxes fox"])
    assert [BERT[i] for i in found["text"][0]] == [
        "[CLS]",
        "a",
        "fox",
        "##es",
        "fox",
        "[SEP]",
        "[PAD]",
        "[PAD]",
    ]
    assert found["text_word"][0].tolist() == [-1, 0, 1, 1, 2, -1, -1, -1]


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_a_vocabulary_is_learned(kind: str) -> None:
    """Known captions come back from their tokens, in fewer tokens than characters."""
    ours = tokenizer(Text(kind=kind, size=600, length=24), lambda: CAPTIONS)  # type: ignore[arg-type]
    found = ours(["red tree and fox den"])
    assert found["text"].shape == (1, 24) and found["text"].dtype == np.int32
    assert found["text_mask"].sum() < 15
    assert found["text"].max() < ours.info.vocabulary <= 600
    back = ours._encoder.decode(found["text"][0][found["text_mask"][0]].tolist())
    assert back.replace("</w>", " ").replace(" ##", "").split() == ["red", "tree", "and", "fox", "den"]


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_a_learned_vocabulary_is_the_same_in_every_process(kind: str) -> None:
    code = (
        "from scaling.data.openmoji import _names; from scaling.data.text import Text, tokenizer\n"
        f"print(tokenizer(Text(kind='{kind}', size=900), lambda: _names()[1]).info.digest)\n"
    )
    digests = set()
    for seed in ("1", "2", "3"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        digests.add(subprocess.check_output([sys.executable, "-c", code], env=env, text=True))
    assert len(digests) == 1


def test_long_captions_are_cut_or_refused() -> None:
    long = " ".join(["red fox"] * 20)
    cut = tokenizer(Text(length=8), lambda: CAPTIONS)([long, "fox"])
    assert cut["text_mask"].sum(axis=1).tolist() == [8, 3]
    assert cut["text"][0, -1] == cut["text"][1, 2]  # the end of text stays
    strict = tokenizer(Text(length=8, too_long="fail"), lambda: CAPTIONS)
    strict(["a red fox"])
    with pytest.raises(
        UserError, match=r"^length=8: 'red fox .*' has 42 tokens; raise it, or give too_long='cut'$"
    ):
        strict([long])


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "caption '': is empty"),
        (" \n", "is empty"),
        (7, "caption 7: is int; must be text"),
        (b"a", "bytes"),
    ],
)
def test_bad_captions_are_named(kind: str, caption: object, message: str) -> None:
    ours = tokenizer(Text(kind=kind), lambda: CAPTIONS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        ours(["a red fox", caption])  # type: ignore[list-item]


def test_a_vocabulary_from_a_package_or_a_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "words_of_clip"
    package.mkdir()
    (package / "__init__.py").touch()
    clip_file(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = tokenizer(Text(vocabulary="words_of_clip:bpe.txt"), never)
    (tmp_path / "clip.json").write_text(ours._encoder.to_str())
    again = tokenizer(Text(vocabulary=str(tmp_path / "clip.json")), never)
    np.testing.assert_array_equal(again(CAPTIONS)["text"], ours(CAPTIONS)["text"])
    assert again.info == ours.info


def test_t5_from_its_json(tmp_path: Path) -> None:
    """A unigram model: of the ways to cut a word, the likeliest, with </s> at the end."""
    import tokenizers

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁red", -2.0),
        ("▁fox", -2.5),
        ("▁r", -3.0),
        ("ed", -3.0),
    ]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer(Text(kind="t5", vocabulary=str(tmp_path / "tokenizer.json"), length=5), never)
    assert ours(["red fox"])["text"].tolist() == [[3, 4, 1, 0, 0]]
    assert ours(["red"])["text_mask"].tolist() == [[True, True, False, False, False]]
    with pytest.raises(UserError, match="vocabulary=None: t5 needs a file"):
        Text(kind="t5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": "nowhere.txt"}, "vocabulary='nowhere.txt': no such file; give one, or PACKAGE:FILE"),
        ({"vocabulary": "no_such_package:a.txt"}, "no package no_such_package is installed"),
        ({"vocabulary": "{folder}/bad.json"}, "cannot be read as clip"),
        ({"vocabulary": "{folder}/bad.txt"}, "cannot be read as clip"),
        ({"vocabulary": "{folder}/bad.txt", "kind": "wordpiece"}, r"vocabulary: has no \[PAD\]"),
        ({"vocabulary": "{folder}/bad.txt", "kind": "t5"}, "must be a tokenizer.json for the kind t5"),
    ],
)
def test_bad_vocabularies_are_named(options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.txt").write_text("one\ntwo three four five\n")
    options["vocabulary"] = options["vocabulary"].format(folder=tmp_path)
    with pytest.raises(UserError, match=message) as e:
        tokenizer(Text(**options), never)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bpe"}, "must be one of clip, wordpiece, t5"),
        ({"length": 2}, "length=2: must be at least 3"),
        ({"size": 9}, "size=9: must be at least 600"),
        ({"too_long": "drop"}, "must be cut or fail"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Text(**options)
