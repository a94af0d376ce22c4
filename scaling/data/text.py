"""Captions as token ids in the forms of CLIP, BERT and T5, by the `tokenizers` library.

A vocabulary comes from a file, alone or within an installed package; if none is given, a small one is learned
from the captions of the training split.
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
from scaling.validation import shown

if TYPE_CHECKING:
    import tokenizers

Words = tuple[str, str]  # a merge of byte-pair encoding: its two parts


@dataclass(frozen=True)
class Text:
    """How captions become tokens.

    The values of `name` are `clip`, byte-pair encoding of lower case, with the end of text as the greatest id
    (Radford et al. 2021, section 2.4); `wordpiece`, BERT's, lower case, [CLS] first and [SEP] last; and `t5`,
    SentencePiece's unigram model, with </s> at the end.
    """

    name: Literal["clip", "wordpiece", "t5"] = "clip"
    vocab_file: str | None = None  # file, or PACKAGE:FILE; None: learned from the captions
    vocab_size: int = 2048  # maximum number of tokens in a learned vocabulary
    max_length: int = 16  # tokens per text, including those of its start and end
    overflow: Literal["cut", "fail"] = "cut"  # treatment of texts longer than max_length

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"name={self.name!r}: must be one of {', '.join(KINDS)}")
        if self.vocab_file is None and KINDS[self.name].learn is None:
            raise UserError(f"vocab_file=None: {self.name} needs a file, such as a tokenizer.json")
        if self.max_length < 3:
            raise UserError(f"max_length={self.max_length}: must be at least 3: a start, a word and an end")
        if self.vocab_size < 600:
            raise UserError(
                f"vocab_size={self.vocab_size}: must be at least 600, for single bytes and special tokens"
            )
        if self.overflow not in ("cut", "fail"):
            raise UserError(f"overflow={self.overflow!r}: must be cut or fail")


@dataclass(frozen=True)
class TextInfo:
    """Properties of tokenised texts that a model, and a resumed run, must know."""

    vocabulary: int  # exclusive upper bound of the token ids
    length: int  # tokens per text, padding included
    digest: str  # digest of the tokenizer
    mask: int | None = None  # id of the token that stands for a hidden word


class Tokenizer:
    """A function from captions [N] to columns: text int32, text_mask bool and text_word int32, all [N, L].

    "text_mask" is true where there is a token. "text_word" counts the words of a caption from 0; it is -1 at
    padding and at tokens that are not part of the caption.
    """

    def __init__(self, encoder: "tokenizers.Tokenizer", options: Text) -> None:
        self.options, self._encoder = options, encoder
        encoder.no_padding()
        encoder.no_truncation()
        digest = hashlib.sha256(json.dumps(_model_json(encoder), sort_keys=True).encode()).hexdigest()[:16]
        kind = KINDS[options.name]
        _check_ends(encoder, options.name)
        mask = encoder.token_to_id(kind.mask) if kind.mask else None
        rows = max(encoder.get_vocab().values()) + 1  # more than the number of tokens if ids have gaps
        self.info = TextInfo(rows, options.max_length, digest, mask)
        if options.overflow == "cut":
            encoder.enable_truncation(options.max_length)
        encoder.enable_padding(
            length=options.max_length, pad_id=encoder.token_to_id(kind.pad) if kind.pad else 0
        )

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the columns of these captions.

        Raises:
            UserError: if a caption is empty, not text, or too long where overflow='fail'.
        """
        encodings = self._encoder.encode_batch([_clean(self.options.name, caption) for caption in captions])
        for caption, encoding in zip(captions, encodings, strict=True):
            if len(encoding.ids) > self.options.max_length:
                raise UserError(
                    f"data.text.max_length={self.options.max_length}: {shown(caption)} has "
                    f"{len(encoding.ids)} tokens; raise it, or give overflow='cut'"
                )
        words = [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings]
        return {
            "text": np.array([encoding.ids for encoding in encodings], np.int32),
            "text_mask": np.array([encoding.attention_mask for encoding in encodings], bool),
            "text_word": np.array(words, np.int32),
        }


def _model_json(encoder: "tokenizers.Tokenizer") -> dict[str, Any]:
    """Returns the encoder's vocabulary and its merges or scores, as a tokenizer.json holds them."""
    model: dict[str, Any] = json.loads(encoder.to_str())["model"]
    return model


def _check_ends(encoder: "tokenizers.Tokenizer", name: str) -> None:
    """Checks that every text ends as the models of its kind expect.

    CLIP's models find the end of a text by its id, which must therefore be the greatest.

    Raises:
        UserError: if texts end otherwise.
    """
    kind, vocabulary = KINDS[name], encoder.get_vocab()
    if encoder.token_to_id(kind.end) is None or encoder.encode("a").tokens[-1:] != [kind.end]:
        raise UserError(f"vocab_file: does not end texts with {kind.end}, as {name} needs; give another file")
    greatest = max(vocabulary, key=lambda token: vocabulary[token])
    if name == "clip" and greatest != kind.end:
        raise UserError(
            f"vocab_file: {greatest!r} has a greater id than {kind.end}, which CLIP finds by having the "
            "greatest; remove the added tokens"
        )


def tokenizer(options: Text, captions: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of these options; `captions` is only called if the vocabulary is learned.

    Raises:
        UserError: if there is no such vocabulary, or it is not of this kind.
    """
    learn = KINDS[options.name].learn
    if options.vocab_file is None and learn is not None:
        cleaned = (_clean(options.name, caption) for caption in captions())
        return Tokenizer(learn(cleaned, options.vocab_size), options)
    path = _vocab_path(str(options.vocab_file))
    try:
        return Tokenizer(_load_encoder(path, options.name), options)
    except UserError:
        raise
    except Exception as e:  # the library raises bare Exceptions
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"vocab_file={options.vocab_file!r}: cannot be read as {options.name} ({reason})"
        ) from None


def _clean(kind: str, caption: object) -> str:
    """Returns a caption without surrounding white space; for CLIP, encodings and HTML are mended too."""
    if not isinstance(caption, str):
        raise UserError(f"caption {shown(caption)}: is {type(caption).__name__}; must be text")
    cleaned = _clean_for_clip(caption) if kind == "clip" else caption.strip()
    if not cleaned.strip():
        raise UserError(f"caption {shown(caption)}: is empty; leave the example out, or give it words")
    return cleaned


@functools.lru_cache(maxsize=2**16)  # 0.1 ms per caption; holds all captions of a small set
def _clean_for_clip(caption: str) -> str:
    """Returns a caption cleaned by the Python functions that the original tokenizer calls.

    The library's normalizers differ from them in rare characters (a final sigma, combining marks). U+0345
    separates words: the original's pattern, which ignores case, matches it neither as a letter nor as
    anything else.
    """
    import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(mended.split()).lower().replace("\u0345", " ")


def _vocab_path(name: str) -> Path:
    """Returns the path of a `vocab_file`, which may lie in a package, PACKAGE:FILE."""
    path = Path(name)
    package, colon, file = name.partition(":")
    if not path.is_file() and colon:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # a part of it is no package, or its name is none
            spec = None
        if spec is None or spec.origin is None:
            raise UserError(f"vocab_file={name!r}: no package {package} is installed")
        path = Path(spec.origin).parent / file
    if not path.is_file():
        raise UserError(f"vocab_file={name!r}: no such file; give one, or PACKAGE:FILE")
    return path


def _load_encoder(path: Path, kind: str) -> "tokenizers.Tokenizer":
    """Reads an encoder from a tokenizer.json, or from a vocabulary file of its kind, which may be gzipped."""
    import tokenizers

    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path))
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        # `splitlines` would split at U+2028 and its like too, which are tokens in a vocabulary.
        return KINDS[kind].load(file.read().removesuffix("\n").split("\n"))


# --- CLIP ------------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # the file has more; with these the vocabulary has 49,408 tokens
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _clip_encoder(vocabulary: dict[str, int], merges: list[Words]) -> "tokenizers.Tokenizer":
    """Returns CLIP's encoder: byte-level pairs, words ending in </w>, between a start and an end of text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    encoder = Tokenizer(
        models.BPE(vocabulary, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END)
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.add_special_tokens([START, END])
    ends = [(token, encoder.token_to_id(token)) for token in (START, END)]
    encoder.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return encoder


def _byte_characters() -> list[str]:
    """Returns the 256 characters that stand for bytes, in the order of CLIP's file: printable ones first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _load_clip(lines: list[str]) -> "tokenizers.Tokenizer":
    """Returns the encoder of the list of merges that CLIP was published with (bpe_simple_vocab_16e6.txt)."""
    alphabet = _byte_characters()
    pairs = [line.split() for line in lines[1 : CLIP_MERGES + 1]]
    merges = [(first, second) for first, second in pairs]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    return _clip_encoder({token: i for i, token in enumerate(tokens)}, merges)


def _learn_clip(captions: Iterable[str], size: int) -> "tokenizers.Tokenizer":
    """Returns CLIP's encoder with merges learned from captions, and a vocabulary of at most `size` tokens."""
    from tokenizers import trainers

    alphabet = _byte_characters()
    characters = [*alphabet, *(f"{c}</w>" for c in alphabet)]
    untrained = _clip_encoder({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, special_tokens=characters, end_of_word_suffix="</w>", show_progress=False
    )
    untrained.train_from_iterator(captions, trainer)
    merges: list[Words] = [(first, second) for first, second in _model_json(untrained)["merges"]]
    tokens = dict.fromkeys([*characters, *("".join(pair) for pair in merges), START, END])
    return _clip_encoder({token: i for i, token in enumerate(tokens)}, merges)


# --- BERT ------------------------------------------------------------------------------------------

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _wordpiece_encoder(vocabulary: dict[str, int]) -> "tokenizers.Tokenizer":
    """Returns BERT's uncased encoder, with texts between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    for token in BERT:
        if vocabulary and token not in vocabulary:
            raise UserError(f"vocab_file: has no {token}; give one of BERT's form, a token a line")
    encoder = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    encoder.normalizer = normalizers.BertNormalizer(lowercase=True)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.add_special_tokens(list(BERT))
    ends = [(token, encoder.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    encoder.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return encoder


def _load_wordpiece(lines: list[str]) -> "tokenizers.Tokenizer":
    """Returns the encoder of BERT's form of vocabulary, one token per line."""
    return _wordpiece_encoder({token: i for i, token in enumerate(lines)})


def _learn_wordpiece(captions: Iterable[str], size: int) -> "tokenizers.Tokenizer":
    """Returns BERT's encoder with a vocabulary of at most `size` tokens, learned from captions."""
    from tokenizers import trainers

    untrained, captions = _wordpiece_encoder({}), list(captions)
    normalize = untrained.normalizer.normalize_str
    characters = sorted({c for caption in captions for c in normalize(caption)} - {" "})
    first_tokens = [*BERT, *characters, *(f"##{c}" for c in characters)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first_tokens, show_progress=False)
    untrained.train_from_iterator(captions, trainer)
    return _wordpiece_encoder(untrained.get_vocab())


# --- T5 --------------------------------------------------------------------------------------------


def _load_t5(lines: list[str]) -> "tokenizers.Tokenizer":
    """Refuses every file: T5's vocabulary is only read from a tokenizer.json."""
    raise UserError("vocab_file: must be a tokenizer.json for name='t5'")


@dataclass(frozen=True)
class Kind:
    """A form of vocabulary: how it is read from the lines of its file, and learned from captions.

    The library's trainers number single characters in the order of a hash map, and break ties by these
    numbers. So the characters are handed over in order, for every process to learn the same vocabulary.
    """

    load: Callable[[list[str]], Any]  # lines of the file -> encoder
    learn: Callable[[Iterable[str], int], Any] | None  # (captions, vocab_size) -> encoder
    end: str  # token at the end of every text
    pad: str | None  # padding token; None: id 0, which is an ordinary token's too
    mask: str | None  # token that stands for a hidden word


KINDS: dict[str, Kind] = {
    "clip": Kind(_load_clip, _learn_clip, end=END, pad=None, mask=None),
    "wordpiece": Kind(_load_wordpiece, _learn_wordpiece, end="[SEP]", pad="[PAD]", mask="[MASK]"),
    "t5": Kind(_load_t5, None, end="</s>", pad="<pad>", mask=None),
}
