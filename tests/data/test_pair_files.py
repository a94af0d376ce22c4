"""Pairs of files: pictures as a viewer shows them, captions as an editor, and no file left out in silence."""

import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from scaling.data import Data, open_source
from scaling.data.sources.pair_files import ARCHIVES, IMAGES, FilePairs
from scaling.errors import UserError
from tests.support.data_files import FILES, png, write


def pairs_of(data: Data, split: str = "train") -> FilePairs:
    found = open_source(data, split).source  # type: ignore[attr-defined]
    assert isinstance(found, FilePairs)
    return found


def stored(folder: Path, files: dict[str, bytes], shard: bool) -> Data:
    """A training split of these files, loose or in one shard."""
    data = write(folder, {} if shard else files, False)
    if shard:
        with tarfile.open(folder / "train/00000.tar", "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return data


def error_of(data: Data) -> str:
    with pytest.raises(UserError) as error:
        open_source(data, "train")
    assert "\n" not in str(error.value)
    return str(error.value)


def encoded(picture: Image.Image, kind: str, exif: Image.Exif | None = None) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("shard", [False, True], ids=["folder", "tar"])
def test_pictures_are_as_a_viewer_shows_them(shard: bool, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo = np.zeros((24, 40, 3), np.uint8)
    photo[:, :20] = 200  # the left half becomes the upper one
    ramp = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    hidden = Image.new("RGBA", (40, 24), (200, 0, 0, 0))
    data = stored(
        tmp_path,
        {
            "a.jpg": encoded(Image.fromarray(photo), "JPEG", exif), "a.txt": b"a photo",
            "b.png": encoded(Image.fromarray(ramp), "PNG"), "b.txt": b"a ramp",
            "c.png": encoded(hidden, "PNG"), "c.txt": b"nothing",
        },
        shard,
    )  # fmt: skip
    turned, grey, white = pairs_of(data).read(np.arange(3))["image"]
    assert turned.shape == (40, 24, 3) and turned[:18].mean() > 190 and turned[22:].mean() < 10
    assert (grey.min(), grey.max()) == (0, 255) and grey.mean() == pytest.approx(127.5, abs=0.5)
    assert (white == 255).all()


ENDS = {
    "U+2028": "a red field\u2028over blue",
    "U+2029": "a red field\u2029over blue",
    "U+0085": "a red field\x85over blue",
    "vertical tab": "a red field\x0bover blue",
    "form feed": "a red field\x0cover blue",
    "separators": "a\x1cred\x1dfield\x1eover",
}


@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_no_other_character_ends_a_line(text: str, tmp_path: Path) -> None:
    data = stored(tmp_path, {"a.png": png(1), "a.txt": f"{text}\nanother".encode()}, False)
    assert pairs_of(data).captions(np.arange(1)) == [(text, "another")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(end: str, tmp_path: Path) -> None:
    text = end.join(["\ufeffone", " two ", "", "three", ""])  # with a byte order mark, as Windows has it
    data = stored(tmp_path, {"a.png": png(1), "a.txt": text.encode()}, False)
    assert pairs_of(data).captions(np.arange(1)) == [("one", "two", "three")]


def test_text_in_other_encodings_is_named(tmp_path: Path) -> None:
    for i, encoding in enumerate(("utf-16", "utf-16-le", "utf-16-be")):
        pair = {"a.png": png(1), "a.txt": "a red field".encode(encoding)}
        data = stored(tmp_path / str(i), {**pair, "b.png": png(2), "b.txt": b"fine"}, False)
        with pytest.raises(
            UserError, match=r"a\.txt: is not text in UTF-8 \(.*\); mend it, or give data\.unre"
        ):
            pairs_of(data).captions(np.arange(1))


@pytest.mark.parametrize(
    "name", ["s.tar.gz", "s.tgz", "S.TAR.GZ", "s.tar.zst", "s.tar.xz", "s.tar.bz2", "s.zip", "sub/s.7z"]
)
@pytest.mark.parametrize("shard", [False, True], ids=["folder", "tar"])
def test_archives_that_are_not_read_are_an_error(name: str, shard: bool, tmp_path: Path) -> None:
    """Half of the data would be left out: beside shards and loose files, and within a shard."""
    data = stored(tmp_path, {**FILES, **({name: b"packed"} if shard else {})}, shard)
    if not shard:
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "train" / name, "w:gz") as tar:
            member = tarfile.TarInfo("elk.png")
            member.size = len(png(1))
            tar.addfile(member, io.BytesIO(png(1)))
    assert ARCHIVES.search(name)
    assert f"{name}: is an archive that is not read" in error_of(data)
    assert "unpack it to a plain .tar" in error_of(data)


def test_names_in_capitals_are_read(tmp_path: Path) -> None:
    data = stored(tmp_path, {"a.PNG": png(7), "a.TXT": b"a"}, False)
    stored(tmp_path / "more", {"b.PNG": png(9), "b.Txt": b"b"}, True)
    (tmp_path / "more/train/00000.tar").rename(tmp_path / "train/00000.TAR")
    found = pairs_of(data)
    assert sorted(found.captions(np.arange(len(found)))) == [("a",), ("b",)]


@pytest.mark.parametrize("suffix", [".tif", ".avif", ".HEIC", ".jxl"])
@pytest.mark.parametrize("shard", [False, True], ids=["folder", "tar"])
def test_pictures_of_other_formats_beside_captions_are_named(
    suffix: str, shard: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = stored(tmp_path, {**FILES, f"elk{suffix}": png(1), "elk.txt": b"an elk"}, shard)
    said = error_of(data)
    assert "elk.txt: has no image beside it (" in said and f"elk{suffix}: not read, since" in said
    assert all(each in said for each in IMAGES)
    caplog.clear()
    skipping = Data(**{**vars(data), "unreadable": "skip"})
    assert len(pairs_of(skipping)) == 4
    assert "1 of 5 pairs of" in caplog.text and f"elk{suffix}: not read" in caplog.text


def test_captions_in_other_files_are_named(tmp_path: Path) -> None:
    data = stored(tmp_path, {**FILES, "elk.png": png(1), "elk.json": b'{"caption": "an elk"}'}, True)
    said = error_of(data)
    assert "elk.png: has no caption beside it (" in said and "elk.json: not read, since" in said


def test_other_files_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {
        "ant.json": b"{}",
        "bee.json": b"{}",
        "bee.tif": png(1),
        ".DS_Store": b"",
        "._ant.png": b"",
        "READ": b"",
    }
    data = stored(tmp_path, FILES | more, False)
    with caplog.at_level(logging.WARNING):
        assert len(pairs_of(data)) == len(pairs_of(data)) == 4
    (record,) = caplog.records
    said = record.getMessage()
    assert "train: 4 files in it are not read (2 .json, 1 READ, 1 .tif): images are .jpg" in said
    assert "DS_Store" not in said and "\n" not in said


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    data = stored(tmp_path / "zoo", {"a.png": png(1), "a.txt": b"a"}, False)
    stored(tmp_path / "farm", {"b.png": png(2), "b.txt": b"b"}, False)
    (tmp_path / "zoo/train/farm").symlink_to(tmp_path / "farm/train")
    assert pairs_of(data).captions(np.arange(2)) == [("a",), ("b",)]
    (tmp_path / "zoo/train/farm").unlink()
    (tmp_path / "zoo/train/self").symlink_to(tmp_path / "zoo")
    assert "self/train: is a link to a folder that it lies in" in error_of(
        Data(**{**vars(data), "threads": 1})
    )


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    data = stored(tmp_path, {"a.png": png(1), "a.txt": b"a"}, False)
    stored(tmp_path / "more", {"b.txt": b"b"}, False)
    (tmp_path / "train/b.txt").symlink_to(tmp_path / "more/train/b.txt")
    (tmp_path / "train/b.png").symlink_to(tmp_path / "more/train/b.png")
    found = pairs_of(data)
    assert len(found) == 2
    with pytest.raises(UserError, match=r"b\.png: is not a readable image \(.*No such file"):
        found.read(np.array([1]))


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scandir = stored(tmp_path, FILES, False), os.scandir
    (tmp_path / "train/closed").mkdir()

    def closed(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root, who may run the tests, may list any folder
    assert "closed: cannot be listed (Permission denied)" in error_of(data)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_links_in_shards_are_named(kind: bytes, tmp_path: Path) -> None:
    data = stored(tmp_path, FILES, True)
    with tarfile.open(tmp_path / "train/00000.tar", "a") as tar:
        for name in ("elk.png", "elk.txt"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, f"ant{name[3:]}"
            tar.addfile(member)
    assert "00000.tar:elk.png: is a link to ant.png, which shards cannot have; pack it again" in error_of(
        data
    )
