"""Tokenizers: CLIP's, BERT's and T5's, from files, packages and captions."""

import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data.prompts import prompts
from scaling.data.sources.openmoji import _named_drawings
from scaling.data.text import Text, Tokenizer, _byte_characters, tokenizer
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
    alphabet = _byte_characters()
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    ours = tokenizer(Text(vocab_file=str(clip_file(tmp_path)), max_length=60), never)
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


REAL = "open_clip:bpe_simple_vocab_16e6.txt.gz"


@cache
def real() -> Tokenizer:
    return tokenizer(Text(vocab_file=REAL, max_length=77), never)


@cache
def open_clip() -> Any:
    """open_clip's own tokenizer: its file alone, since its package imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations, "make test installs open_clip_torch"
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("tokenizer_of_open_clip", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(os.environ)
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module.SimpleTokenizer()


def test_clip_has_the_vocabulary_of_the_released_models() -> None:
    assert real().info.vocabulary == open_clip().vocab_size == 49408
    assert real()(["a"])["text"][0, :4].tolist() == [49406, 320, 49407, 0]


@pytest.mark.parametrize("share", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_clip_agrees_with_open_clip_on_names_and_prompts(share: int) -> None:
    """OpenMoji's names, and one in `share` of ImageNet's classes in each template."""
    every = [
        prompt
        for i, of_a_class in enumerate(prompts("imagenet", "imagenet"))
        for prompt in of_a_class[i % share :: share]
    ]
    assert len(every) == 80_000 // share
    captions = _named_drawings()[1] + every
    np.testing.assert_array_equal(real()(captions)["text"], open_clip()(captions).numpy())


# Unassigned code points are left out: which are letters depends on the Unicode version of a library.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
ODD = [
    "&amp;",
    "&eacute;",
    "e&#769;",
    "'s",
    "'S",
    "'ſ",
    "ΣΑΣ",
    "İ",
    "Ǆ",
    "cafÃ©",
    "\u2028",
    "\x1c",
    "\x85",
    "\u0345",
]


@settings(max_examples=500)
@given(st.lists(st.one_of(st.text(CHARACTERS), st.sampled_from(ODD), st.characters(max_codepoint=127))))
def test_clip_agrees_with_open_clip_on_any_string(parts: list[str]) -> None:
    caption = "a " + "".join(parts)
    unassigned = any(unicodedata.category(c) == "Cn" for c in open_clip().clean_fn(caption))
    if not unassigned and "<" not in caption:  # the specials' names differ
        np.testing.assert_array_equal(real()([caption])["text"], open_clip()([caption]).numpy())


def test_clip_reads_as_many_merges_as_clip_uses(tmp_path: Path) -> None:
    """Of a file that is as long as the published one, which goes on."""
    characters = _byte_characters()
    words = [f"{a}{b}" for a in characters[:190] for b in characters]  # 48,640, none of them twice
    merges = [" ".join(word) for word in words] + [f"{words[i]} {words[i + 1]}" for i in range(1000)]
    path = tmp_path / "bpe.txt"
    path.write_text("\n".join(["#version", *merges, ""]), encoding="utf-8")
    ours = tokenizer(Text(vocab_file=str(path)), never)
    assert ours.info.vocabulary == 49408
    assert ours(["a"])["text"][0, 2] == 49407
    last = merges[49152 - 256 - 2 - 1].replace(" ", "")
    assert ours._encoder.token_to_id(last) == 49405


def test_clip_mends_html_and_broken_encodings(tmp_path: Path) -> None:
    ours = tokenizer(Text(vocab_file=str(clip_file(tmp_path)), max_length=30), never)
    one, other = ours(["fox &amp;amp; bird", "fox & bird"])["text"]
    np.testing.assert_array_equal(one, other)
    one, other = ours(["cafÃ©", "café"])["text"]
    np.testing.assert_array_equal(one, other)


def test_clip_end_of_text_is_the_greatest_id() -> None:
    ours = tokenizer(Text(max_length=12), lambda: CAPTIONS)
    found = ours(CAPTIONS)
    assert (found["text"].max(axis=1) == ours.info.vocabulary - 1).all()
    assert (found["text"][:, 0] == ours.info.vocabulary - 2).all()


def test_wordpiece_agrees_with_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT))
    theirs = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    ours = tokenizer(Text(name="wordpiece", vocab_file=str(path), max_length=12), never)
    captions = ["A red fox!", "unaffable foxes, red", "zebra Fóx", "a , a"]
    found = ours(captions)
    expected = theirs(captions, padding="max_length", max_length=12, truncation=True)
    np.testing.assert_array_equal(found["text"], expected["input_ids"])
    np.testing.assert_array_equal(found["text_mask"], np.array(expected["attention_mask"], bool))
    assert ours.info.mask == BERT.index("[MASK]")


def test_words_are_numbered_across_their_pieces(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT))
    found = tokenizer(Text(name="wordpiece", vocab_file=str(path), max_length=8), never)(["a foxes fox"])
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
    ours = tokenizer(Text(name=kind, vocab_size=600, max_length=24), lambda: CAPTIONS)  # type: ignore[arg-type]
    found = ours(["red tree and fox den"])
    assert found["text"].shape == (1, 24) and found["text"].dtype == np.int32
    assert found["text_mask"].sum() < 15
    assert found["text"].max() < ours.info.vocabulary <= 600
    back = ours._encoder.decode(found["text"][0][found["text_mask"][0]].tolist())
    assert back.replace("</w>", " ").replace(" ##", "").split() == ["red", "tree", "and", "fox", "den"]


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_a_learned_vocabulary_is_the_same_in_every_process(kind: str) -> None:
    code = (
        "from scaling.data.sources.openmoji import _named_drawings\n"
        "from scaling.data.text import Text, tokenizer\n"
        f"print(tokenizer(Text(name='{kind}', vocab_size=900), lambda: _named_drawings()[1]).info.digest)\n"
    )
    digests = set()
    for seed in ("1", "2", "3"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        digests.add(subprocess.check_output([sys.executable, "-c", code], env=env, text=True))
    assert len(digests) == 1


def test_long_captions_are_cut_or_refused() -> None:
    long = " ".join(["red fox"] * 20)
    cut = tokenizer(Text(max_length=8), lambda: CAPTIONS)([long, "fox"])
    assert cut["text_mask"].sum(axis=1).tolist() == [8, 3]
    assert cut["text"][0, -1] == cut["text"][1, 2]  # the end of text stays
    strict = tokenizer(Text(max_length=8, overflow="fail"), lambda: CAPTIONS)
    strict(["a red fox"])
    with pytest.raises(
        UserError,
        match=r"^data.text.max_length=8: 'red fox .*' has 42 tokens; raise it, or give overflow='cut'$",
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
    ours = tokenizer(Text(name=kind), lambda: CAPTIONS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        ours(["a red fox", caption])  # type: ignore[list-item]


def test_a_vocabulary_from_a_package_or_a_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "words_of_clip"
    package.mkdir()
    (package / "__init__.py").touch()
    clip_file(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = tokenizer(Text(vocab_file="words_of_clip:bpe.txt"), never)
    (tmp_path / "clip.json").write_text(ours._encoder.to_str())
    again = tokenizer(Text(vocab_file=str(tmp_path / "clip.json")), never)
    np.testing.assert_array_equal(again(CAPTIONS)["text"], ours(CAPTIONS)["text"])
    assert again.info == ours.info


@pytest.mark.parametrize("kind", ["clip", "wordpiece"])
def test_the_end_of_a_text_is_checked(kind: str, tmp_path: Path) -> None:
    """A model finds it by its id: a tokenizer.json must end texts with it, and CLIP's have it last."""
    ours = tokenizer(Text(name=kind), lambda: CAPTIONS)._encoder  # type: ignore[arg-type]
    plain = json.loads(ours.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**plain, "post_processor": None}))
    with pytest.raises(UserError, match=f"vocab_file: does not end texts with .*, as {kind} needs"):
        tokenizer(Text(name=kind, vocab_file=str(path)), never)  # type: ignore[arg-type]
    ours.add_tokens(["<my cat>"])
    path.write_text(ours.to_str())
    if kind == "clip":
        with pytest.raises(
            UserError, match=r"vocab_file: '<my cat>' has a greater id than .*; remove the added"
        ):
            tokenizer(Text(name="clip", vocab_file=str(path)), never)
    else:
        again = tokenizer(Text(name="wordpiece", vocab_file=str(path)), never)
        assert again(["<my cat>"])["text"].max() == again.info.vocabulary - 1


def test_no_id_is_beyond_the_vocabulary(tmp_path: Path) -> None:
    """Not of a file with a token twice either, nor with one that other code takes for the end of a line."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*BERT, "red", "\u2028", "tree", ""]), encoding="utf-8")
    theirs = transformers.BertTokenizerFast.from_pretrained(str(tmp_path))
    ours = tokenizer(Text(name="wordpiece", vocab_file=str(path), max_length=8), never)
    found = ours(["red tree"])["text"]
    assert found.tolist() == [theirs("red tree", padding="max_length", max_length=8)["input_ids"]]
    assert found.max() == ours.info.vocabulary - 1 == len(BERT) + 2


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
    ours = tokenizer(Text(name="t5", vocab_file=str(tmp_path / "tokenizer.json"), max_length=5), never)
    assert ours(["red fox"])["text"].tolist() == [[3, 4, 1, 0, 0]]
    assert ours(["red"])["text_mask"].tolist() == [[True, True, False, False, False]]
    with pytest.raises(UserError, match="vocab_file=None: t5 needs a file"):
        Text(name="t5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_file": "nowhere.txt"}, "vocab_file='nowhere.txt': no such file; give one, or PACKAGE:FILE"),
        ({"vocab_file": "no_such_package:a.txt"}, "no package no_such_package is installed"),
        ({"vocab_file": "{folder}/bad.json"}, "cannot be read as clip"),
        ({"vocab_file": "{folder}/bad.txt"}, "cannot be read as clip"),
        ({"vocab_file": "{folder}/bad.txt", "name": "wordpiece"}, r"vocab_file: has no \[PAD\]"),
        ({"vocab_file": "{folder}/bad.txt", "name": "t5"}, "must be a tokenizer.json for name='t5'"),
    ],
)
def test_bad_vocabularies_are_named(options: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.txt").write_text("one\ntwo three four five\n")
    options["vocab_file"] = options["vocab_file"].format(folder=tmp_path)
    with pytest.raises(UserError, match=message) as e:
        tokenizer(Text(**options), never)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bpe"}, "must be one of clip, wordpiece, t5"),
        ({"max_length": 2}, "max_length=2: must be at least 3"),
        ({"vocab_size": 9}, "vocab_size=9: must be at least 600"),
        ({"overflow": "drop"}, "must be cut or fail"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Text(**options)
