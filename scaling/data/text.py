"""Captions as token ids, by the `tokenizers` library: CLIP's, BERT's and T5's forms of text.

A vocabulary comes from a file, alone or within an installed package; where none is given, a small one is
learned from the captions of the training split.
"""

import functools
import gzip
import hashlib
import html
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scaling.errors import UserError

if TYPE_CHECKING:
    import tokenizers

Words = tuple[str, str]


@dataclass(frozen=True)
class Text:
    """How captions become tokens.

    `clip`: lower case, byte-pair encoding, the end of text having the greatest id (Radford et al. 2021,
    section 2.4). `wordpiece`: BERT's, lower case, [CLS] first and [SEP] last. `t5`: SentencePiece's unigram
    model, with </s> at the end.
    """

    kind: Literal["clip", "wordpiece", "t5"] = "clip"
    vocabulary: str | None = None  # a file, or PACKAGE:FILE; None learns one from the captions
    size: int = 2048  # tokens of a learned vocabulary, at most
    length: int = 16  # tokens of a text, those of its start and end included
    too_long: Literal["cut", "fail"] = "cut"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.vocabulary is None and KINDS[self.kind].learn is None:
            raise UserError(f"vocabulary=None: {self.kind} needs a file, such as a tokenizer.json")
        if self.length < 3:
            raise UserError(f"length={self.length}: must be at least 3: a start, a word and an end")
        if self.size < 600:
            raise UserError(f"size={self.size}: must be at least 600, for single bytes and special tokens")
        if self.too_long not in ("cut", "fail"):
            raise UserError(f"too_long={self.too_long!r}: must be cut or fail")


@dataclass(frozen=True)
class TextInfo:
    """What a model, and a run that is resumed, must know of its texts."""

    vocabulary: int  # token ids are below it
    length: int
    digest: str  # of the tokenizer
    mask: int | None = None  # id of the token that stands for a hidden word


class Tokenizer:
    """Captions [N] -> columns: text int32 [N, L], text_mask bool [N, L] and text_word int32 [N, L].

    The mask is true where there is a token, and "text_word" counts the words of a caption from 0: -1 at
    padding and at tokens that are no part of the caption.
    """

    def __init__(self, encoder: "tokenizers.Tokenizer", options: Text) -> None:
        self.options, self._encoder = options, encoder
        encoder.no_padding()
        encoder.no_truncation()
        digest = hashlib.sha256(json.dumps(_model(encoder), sort_keys=True).encode()).hexdigest()[:16]
        kind = KINDS[options.kind]
        _check_ends(encoder, options.kind)
        mask = encoder.token_to_id(kind.mask) if kind.mask else None
        rows = max(encoder.get_vocab().values()) + 1  # more than there are tokens, where ids leave gaps
        self.info = TextInfo(rows, options.length, digest, mask)
        if options.too_long == "cut":
            encoder.enable_truncation(options.length)
        encoder.enable_padding(length=options.length, pad_id=encoder.token_to_id(kind.pad) if kind.pad else 0)

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Raises UserError for a caption that is empty, not text, or (where it may not be cut) too long."""
        encoded = self._encoder.encode_batch([_clean(self.options.kind, caption) for caption in captions])
        for caption, found in zip(captions, encoded, strict=True):
            if len(found.ids) > self.options.length:
                raise UserError(
                    f"length={self.options.length}: {caption!r} has {len(found.ids)} tokens; raise it, or "
                    "give too_long='cut'"
                )
        words = [[-1 if word is None else word for word in found.word_ids] for found in encoded]
        return {
            "text": np.array([found.ids for found in encoded], np.int32),
            "text_mask": np.array([found.attention_mask for found in encoded], bool),
            "text_word": np.array(words, np.int32),
        }


def _model(encoder: "tokenizers.Tokenizer") -> dict[str, Any]:
    """Its vocabulary, and merges or scores."""
    found: dict[str, Any] = json.loads(encoder.to_str())["model"]
    return found


def _check_ends(encoder: "tokenizers.Tokenizer", name: str) -> None:
    """Raises UserError unless every text ends as the models of its kind expect.

    CLIP's find the end of a text by its id, which must therefore be the greatest one.
    """
    kind, vocabulary = KINDS[name], encoder.get_vocab()
    if encoder.token_to_id(kind.end) is None or encoder.encode("a").tokens[-1:] != [kind.end]:
        raise UserError(f"vocabulary: does not end texts with {kind.end}, as {name} needs; give another file")
    greatest = max(vocabulary, key=lambda token: vocabulary[token])
    if name == "clip" and greatest != kind.end:
        raise UserError(
            f"vocabulary: {greatest!r} has a greater id than {kind.end}, which CLIP finds by having the "
            "greatest; remove the added tokens"
        )


def tokenizer(options: Text, captions: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of these options; `captions` are asked for only where the vocabulary is learned.

    Raises: UserError for a vocabulary that is not there, or not of this kind.
    """
    learn = KINDS[options.kind].learn
    if options.vocabulary is None and learn is not None:
        cleaned = (_clean(options.kind, caption) for caption in captions())
        return Tokenizer(learn(cleaned, options.size), options)
    path = _vocabulary(str(options.vocabulary))
    try:
        return Tokenizer(_load(path, options.kind), options)
    except UserError:
        raise
    except Exception as e:  # the library raises bare Exceptions
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"vocabulary={options.vocabulary!r}: cannot be read as {options.kind} ({reason})"
        ) from None


def _clean(kind: str, caption: object) -> str:
    """A caption as its tokenizer wants it; CLIP's own mends broken encodings and HTML first."""
    if not isinstance(caption, str):
        raise UserError(f"caption {caption!r}: is {type(caption).__name__}; must be text")
    mended = _mended(caption) if kind == "clip" else caption.strip()
    if not mended:
        raise UserError(f"caption {caption!r}: is empty; leave the example out, or give it words")
    return mended


@functools.lru_cache(maxsize=2**16)  # a tenth of a millisecond each: of a small set, all are remembered
def _mended(caption: str) -> str:
    """Returns a caption cleaned by Python's own functions, as the original tokenizer calls them.

    The library's normalizers differ from them in rare characters (a final sigma, combining marks). U+0345
    parts words: the original's pattern, which ignores case, takes it for neither a letter nor anything else.
    """
    import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(mended.split()).lower().replace("\u0345", " ")


def _vocabulary(name: str) -> Path:
    path = Path(name)
    package, colon, file = name.partition(":")
    if not path.is_file() and colon:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise UserError(f"vocabulary={name!r}: no package {package} is installed")
        path = Path(found.origin).parent / file
    if not path.is_file():
        raise UserError(f"vocabulary={name!r}: no such file; give one, or PACKAGE:FILE")
    return path


def _load(path: Path, kind: str) -> "tokenizers.Tokenizer":
    import tokenizers

    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path))
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        # Not `splitlines`: in a vocabulary U+2028 and its like are tokens.
        return KINDS[kind].load(file.read().removesuffix("\n").split("\n"))


# --- CLIP ------------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # the file has more of them; with these the vocabulary has 49,408 tokens
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _clip(vocabulary: dict[str, int], merges: list[Words]) -> "tokenizers.Tokenizer":
    """CLIP's encoder: byte-level pairs, words ending in </w>, between a start and an end of text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END)
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.add_special_tokens([START, END])
    ends = [(token, made.token_to_id(token)) for token in (START, END)]
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return made


def _bytes() -> list[str]:
    """The 256 characters that stand for bytes, in the order of CLIP's file: printable ones first."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(rest))]


def _clip_file(lines: list[str]) -> "tokenizers.Tokenizer":
    """Of the list of merges that CLIP was published with (bpe_simple_vocab_16e6.txt)."""
    alphabet = _bytes()
    pairs = [line.split() for line in lines[1 : CLIP_MERGES + 1]]
    merges = [(first, second) for first, second in pairs]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    return _clip({token: i for i, token in enumerate(tokens)}, merges)


def _clip_learned(captions: Iterable[str], size: int) -> "tokenizers.Tokenizer":
    from tokenizers import trainers

    alphabet = _bytes()
    known = [*alphabet, *(f"{c}</w>" for c in alphabet)]
    blank = _clip({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, special_tokens=known, end_of_word_suffix="</w>", show_progress=False
    )
    blank.train_from_iterator(captions, trainer)
    merges: list[Words] = [(first, second) for first, second in _model(blank)["merges"]]
    tokens = dict.fromkeys([*known, *("".join(pair) for pair in merges), START, END])
    return _clip({token: i for i, token in enumerate(tokens)}, merges)


# --- BERT ------------------------------------------------------------------------------------------

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _wordpiece(vocabulary: dict[str, int]) -> "tokenizers.Tokenizer":
    """BERT's uncased encoder, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    for token in BERT:
        if vocabulary and token not in vocabulary:
            raise UserError(f"vocabulary: has no {token}; give one of BERT's form, a token a line")
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(BERT))
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


def _wordpiece_file(lines: list[str]) -> "tokenizers.Tokenizer":
    return _wordpiece({token: i for i, token in enumerate(lines)})


def _wordpiece_learned(captions: Iterable[str], size: int) -> "tokenizers.Tokenizer":
    from tokenizers import trainers

    blank, captions = _wordpiece({}), list(captions)
    characters = sorted({c for caption in captions for c in blank.normalizer.normalize_str(caption)} - {" "})
    known = [*BERT, *characters, *(f"##{c}" for c in characters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    blank.train_from_iterator(captions, trainer)
    return _wordpiece(blank.get_vocab())


# --- T5 --------------------------------------------------------------------------------------------


def _t5_file(lines: list[str]) -> "tokenizers.Tokenizer":
    raise UserError("vocabulary: must be a tokenizer.json for the kind t5")


@dataclass(frozen=True)
class Kind:
    """How a vocabulary of one form is read from the lines of its file, and learned from captions.

    The library's trainers number single characters in the order of a hash map, and break ties by these
    numbers; they are given in order beforehand, so that every process learns the same.
    """

    load: Callable[[list[str]], Any]
    learn: Callable[[Iterable[str], int], Any] | None
    end: str  # what every text ends with
    pad: str | None  # None: id 0, which is an ordinary token's too
    mask: str | None


KINDS: dict[str, Kind] = {
    "clip": Kind(_clip_file, _clip_learned, end=END, pad=None, mask=None),
    "wordpiece": Kind(_wordpiece_file, _wordpiece_learned, end="[SEP]", pad="[PAD]", mask="[MASK]"),
    "t5": Kind(_t5_file, None, end="</s>", pad="<pad>", mask=None),
}
