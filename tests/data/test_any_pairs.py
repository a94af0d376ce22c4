"""Shards and captions with anything in them: read as they are, or refused in one line."""

import functools
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data.folders import SKIP
from scaling.data.sources.pair_files import FilePairs, Part, lines, pair_files
from scaling.data.sources.tfds import _decode_captions
from scaling.data.text import Text, Tokenizer, tokenizer
from scaling.errors import UserError
from tests.support.data_files import FILES, png

LINE = 600  # characters of an error that is still read

# --- shards ---

Member = tuple[str, bytes]  # name and type
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "x" * 120
STEMS = ("a", "sub/a", "./sub/b", "é", "a\nb", "\x1b[2J", "\u2028", LONG, "\udcff", "a b", "C:\\a", "..a/b")
ENDINGS = ((".png", ".txt"), (".PNG", ".Txt"), (".jpg", ".x.txt"), (".y.webp", ".txt"))
FILE = tarfile.REGTYPE
UNREAD: tuple[Member, ...] = (
    *((name, FILE) for name in ("q.json", "README", "q\n.x\ny", ".q.png", ".q/", "", "/", "..", ".", "//")),
    *((name, FILE) for name in ("__MACOSX/._q.txt", "q.txt.json", f"{LONG * 2}.tif")),
    *(("q.png", kind) for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)),
)
# Half a pair, what is no file of its own though it has both names, and archives.
REFUSED: tuple[tuple[Member, ...], ...] = (
    *(((name, FILE),) for name in ("q.png", "q\n.txt", "q.txt/", "s/q.GIF", "q.zip", "s/q.tar.gz")),
    *(
        (("q.png", kind), ("q.txt", kind))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE)
    ),
)


def shard(members: list[tuple[str, bytes, bytes]], kind: str) -> bytes:
    """A shard of members of these names, types and contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for name, type_, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = type_, len(content) if type_ == FILE else 0
            member.linkname = "a.png"
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def opened_or_refused(content: bytes, use: Callable[[FilePairs], Any]) -> Any:
    """What `use` makes of a split with this shard alone; None if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train/0.tar"
        path.parent.mkdir()
        path.write_bytes(content)
        try:
            return use(pair_files(Path(folder), "train", False, 1))
        except UserError as e:
            assert folder in str(e) and "\n" not in str(e)
            return None


def shades_and_captions(found: FilePairs) -> list[tuple[int, tuple[str, ...]]]:
    rows = np.arange(len(found))
    images = found.read(rows)["image"]
    assert all((image == image[0, 0, 0]).all() for image in images)
    return sorted(zip((int(image[0, 0, 0]) for image in images), found.captions(rows), strict=True))


PAIRS = st.dictionaries(st.sampled_from(STEMS), st.sampled_from(ENDINGS), min_size=1, max_size=4)
ORDERS = st.randoms(use_true_random=False)


@pytest.mark.parametrize(
    "beside", [*((member,) for member in UNREAD), *REFUSED], ids=lambda each: repr(each)[:40]
)
@given(PAIRS, st.lists(st.sampled_from(UNREAD), max_size=2), st.sampled_from(["gnu", "pax"]), ORDERS)
@settings(max_examples=8)
def test_pairs_are_read_among_any_members(
    beside: tuple[Member, ...],
    pairs: dict[str, tuple[str, str]],
    more: list[Member],
    kind: str,
    order: Any,
) -> None:
    """Every picture with its own caption, whatever lies beside them, unless that cannot be read."""
    members = [(name, type_, b"junk") for name, type_ in (*beside, *more)]
    for i, (stem, endings) in enumerate(pairs.items()):
        contents = png(10 * i), f"caption {i}".encode()
        members += [(f"{stem}{end}", FILE, part) for end, part in zip(endings, contents, strict=True)]
    order.shuffle(members)
    if beside in REFUSED:
        assert opened_or_refused(shard(members, kind), len) is None
        return
    found = opened_or_refused(shard(members, kind), shades_and_captions)
    assert found == [(10 * i, (f"caption {i}",)) for i in range(len(pairs))]


WHOLE = {
    kind: shard([(f"{folder}{name}", FILE, content) for name, content in FILES.items()], kind)
    for kind, folder in (("ustar", ""), ("gnu", "é" * 60 + "/"), ("pax", "é" * 60 + "/"))
}
BLOCKS = st.tuples(st.integers(0, 50), st.integers(1, 60))  # first of those that are zeros, and their number
BYTES = st.tuples(
    st.integers(0, 50), st.sampled_from([0, 99, 124, 135, 156]) | st.integers(0, 511), st.integers(0, 255)
)


@pytest.mark.parametrize("kind", FORMATS)
@given(st.lists(BYTES, max_size=3), st.lists(BLOCKS, max_size=1), st.booleans())
@settings(max_examples=120)
def test_a_damaged_shard_is_read_whole_or_refused(
    kind: str, changes: list[tuple[int, int, int]], holes: list[tuple[int, int]], cut: bool
) -> None:
    """No member is lost, and each has the bytes that it has in the file."""
    content = bytearray(WHOLE[kind])
    with tarfile.open(fileobj=io.BytesIO(WHOLE[kind])) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
        last = max(member.offset for member in tar)  # a hole to the end cannot be told from an end
    for block, place, value in changes:
        content[(512 * block + place) % len(content)] = value
    for first, count in holes:
        end = min(512 * (first + count), last)
        content[512 * first : end] = bytes(max(end - 512 * first, 0))
    if cut:
        del content[holes[0][0] * 512 if holes else 700 :]

    def parts(found: FilePairs) -> dict[str, bytes]:
        return {part.member: part.bytes() for part in (*found.images, *found.texts)}

    found = opened_or_refused(bytes(content), parts)
    assert found is None or found == {name: content[at : at + size] for name, (at, size) in places.items()}


@given(st.binary(max_size=600))
@settings(max_examples=50)
def test_any_bytes_are_no_shard(content: bytes) -> None:
    assert opened_or_refused(content, len) is None


def test_two_archives_in_one_file_are_not_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(WHOLE["ustar"] * 2)
    with pytest.raises(
        UserError, match=r"0\.tar: is not a whole tar file \(it goes on after its end\); copy"
    ):
        pair_files(tmp_path, "train", False, 1)


def test_a_shard_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").symlink_to(tmp_path / "none.tar")
    with pytest.raises(UserError, match=r"0\.tar: is not a whole tar file \(.*No such file"):
        pair_files(tmp_path, "train", False, 1)


# --- captions ---

SPACES = ("\u2028", "\u2029", "\x85", "\x0b", "\x1c", " ", "&nbsp;")
ODD = (*SPACES, "\ufeff", "\u0345", "\u200b", "<|endoftext|>", "[MASK]")
TEXTS = st.lists(
    st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")) | st.sampled_from(ODD), max_size=4
).map("".join)


def captions_of(content: bytes) -> tuple[str, ...] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(content)
        try:
            return lines(Part(path))
        except UserError as e:
            assert str(path) in str(e) and str(e).endswith(SKIP) and "\n" not in str(e)
            return None


@given(st.lists(TEXTS, max_size=4), st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), st.booleans())
@settings(max_examples=120)
def test_captions_come_back_line_by_line(texts: list[str], end: str, mark: bool) -> None:
    content = end.join(texts).encode("utf-8-sig" if mark else "utf-8")
    texts = texts if mark or not texts else [texts[0].removeprefix("\ufeff"), *texts[1:]]
    expected = tuple(text.strip() for text in texts if text.strip())
    assert captions_of(content) == (expected or None)


@given(st.binary(max_size=40) | TEXTS.map(lambda text: text.encode("utf-16-le")))
@settings(max_examples=200)
def test_any_bytes_are_captions_or_refused(content: bytes) -> None:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    found = captions_of(content)
    assert (found is not None) == bool("\0" not in text and text.removeprefix("\ufeff").strip())
    assert all(caption.strip() == caption != "" and caption in text for caption in found or ())


BYTES_OR_TEXTS = st.binary(max_size=20) | TEXTS.map(str.encode)


@given(st.lists(BYTES_OR_TEXTS, min_size=1, max_size=3), st.sampled_from(["one", "several", "with ids"]))
@settings(max_examples=200)
def test_any_captions_of_a_prepared_set_are_text_or_refused(captions: list[bytes], form: str) -> None:
    captions = captions[:1] if form == "one" else [caption * 50 for caption in captions]
    forms = {"one": captions[0], "several": captions, "with ids": {"text": captions, "id": [3]}}
    try:
        assert [caption.encode() for caption in _decode_captions(forms[form])] == captions
    except UserError as e:
        assert "is not text in UTF-8" in str(e) and "\n" not in str(e) and len(str(e)) < LINE


@functools.cache
def learned(name: Any, overflow: Any) -> Tokenizer:
    options = Text(name=name, vocab_size=600, max_length=8, overflow=overflow)
    return tokenizer(options, lambda: ["a red fox", "two foxes"])


@pytest.mark.parametrize("overflow", ["cut", "fail"])
@pytest.mark.parametrize("name", ["clip", "wordpiece"])
@given(TEXTS, st.sampled_from([1, 1, 3, 400]))
@settings(max_examples=80)
def test_any_caption_has_its_tokens_or_is_refused(name: str, overflow: str, caption: str, times: int) -> None:
    """Tokens of the vocabulary from its start to its end, then padding; a long one is cut, or refused."""
    ours = learned(name, overflow)
    try:
        found = ours([caption * times])
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < LINE
        assert "is empty" in str(e) or (overflow == "fail" and "tokens; raise it, or give" in str(e))
        return
    tokens, mask = found["text"][0], found["text_mask"][0]
    count = int(mask.sum())
    start, end = ours(["a"])["text"][0, [0, 2]].tolist()
    assert tokens.shape == (8,) and count >= 2 and mask[:count].all()
    assert min(tokens) >= 0 and max(tokens) < ours.info.vocabulary
    assert tokens[0] == start and tokens[count - 1] == end
