"""Images with captions: the embedded drawings, folders and shards of files, and TFDS."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from scaling.data import Data, eval_batches, info, open_source, tokenizer_of, train_batches
from scaling.data.pairs import Pairs, Tokenized
from scaling.data.pipeline import train_rows
from scaling.data.sources.openmoji import TONES, held_out
from scaling.data.text import Text
from scaling.errors import UserError
from tests.support.data_files import FILES, png, write

OPENMOJI = Data(name="openmoji", image_size=8, batch_size=16, text=Text(vocab_size=700))


def drawings(split: str) -> Tokenized:
    source = open_source(OPENMOJI, split)
    assert isinstance(source, Tokenized)
    return source


def names(split: str) -> list[str]:
    source = drawings(split)
    return [caption for (caption,) in source.source.captions(np.arange(len(source)))]


def test_held_out_drawings_are_new_combinations_of_known_words() -> None:
    train, test = names("train"), names("test")
    assert (len(train), len(test)) == (3453, 500)
    assert len(set(test)) == 500 and not set(test) & set(train)
    words = Counter(word for name in train for word in set(name.lower().split()))
    assert all(words[word] >= 3 for name in test for word in name.lower().split())


def test_held_out_never_takes_a_word_below_three() -> None:
    """A single word is no combination, and a caption of two drawings tells neither."""
    captions = [
        f"{how} {what}" for how in ("red", "old", "big", "wee") for what in ("fox", "owl", "ant", "bee")
    ]
    captions += ["fox", "fox", "red owl", "red owl"]
    test = held_out(captions, 20)
    left = Counter(word for each, out in zip(captions, test, strict=True) if not out for word in each.split())
    assert 2 <= test.sum() <= 6 and not test[16:].any()
    assert held_out(captions, 1).sum() == 1
    for caption, out in zip(captions, test, strict=True):
        assert not out or all(left[word] >= 3 for word in caption.split())


def test_drawings_are_drawn_on_white_in_colour() -> None:
    found = open_source(Data(name="openmoji", image_size=24), "train").read(np.arange(200))
    images = found["image"]
    assert images.shape == (200, 24, 24, 3) and images.dtype == np.uint8
    assert (images[:, 0, 0] > 250).all(axis=-1).mean() > 0.9  # corners
    assert images.reshape(200, -1).std(axis=1).min() > 3.0
    assert np.abs(images[..., 0].astype(int) - images[..., 2]).max() > 100


def test_tones_are_the_word_of_the_caption() -> None:
    everything = {}
    for split in ("train", "test"):
        pairs, tones = drawings(split).source, open_source(Data(name="openmoji_tones", image_size=8), split)
        images, labels = tones.read(np.arange(len(tones))).values()
        rows = [i for i, name in enumerate(names(split)) if name.count("skin tone") == 1]
        captions = [pairs.captions(np.array([row]))[0][0] for row in rows]
        everything[split] = len(tones)
        assert len(tones) >= len(rows)
        kept = [i for i, c in enumerate(captions) if c.endswith("skin tone")]
        found = {image.tobytes(): TONES[label] for image, label in zip(images, labels, strict=True)}
        for i in kept:
            image = pairs.read(np.array([rows[i]]))["image"][0]
            assert f" {found[image.tobytes()]} skin tone" in f" {captions[i]}"
    assert everything == {"train": 1314, "test": 341}


def test_what_is_known_before_any_batch() -> None:
    found = info(OPENMOJI)
    assert found.name == "openmoji" and found.num_classes == 0 and found.text is not None
    assert found.text == tokenizer_of(OPENMOJI).info and found.text.vocabulary <= 700
    shapes = {name: shape for name, (shape, _) in found.columns.items()}
    assert shapes == {"image": (8, 8, 3), "text": (16,), "text_mask": (16,), "text_word": (16,)}


def test_batches_pair_images_with_their_captions() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    source, encode = drawings("train"), tokenizer_of(OPENMOJI)
    known = {image.tobytes(): row for row, image in enumerate(source.source.read(np.arange(3453))["image"])}
    batch = jax.device_get(next(train_batches(OPENMOJI, 0, 3, place)))
    assert {k: v.shape for k, v in batch.items()} == {
        "image": (16, 8, 8, 3), "text": (16, 16), "text_mask": (16, 16), "text_word": (16, 16)
    }  # fmt: skip
    same = 0
    for image, text in zip(batch["image"], batch["text"], strict=True):
        caption = source.source.captions(np.array([known[image.tobytes()]]))[0][0]
        same += (encode([caption])["text"][0] == text).all()
    assert same >= 14  # two drawings of eight pixels may look alike
    count = sum(b["mask"].sum() for b in jax.device_get(list(eval_batches(OPENMOJI, "test", 64, place))))
    assert count == 500


@pytest.mark.parametrize("shards", [False, True], ids=["folder", "tar"])
def test_files(shards: bool, tmp_path: Path) -> None:
    data = write(tmp_path / "zoo", {f"sub/{k}" if not shards else k: v for k, v in FILES.items()}, shards)
    source = open_source(data, "train")
    assert isinstance(source, Tokenized) and isinstance(source.source, Pairs)
    assert (source.name, len(source), info(data).image_shape) == ("zoo", 4, (4, 4, 3))
    assert source.source.captions(np.array([2, 0])) == [
        ("a cow", "the cow again"),
        ("a ant", "the ant again"),
    ]
    assert [int(image[0, 0, 0]) for image in source.source.read(np.arange(4))["image"]] == [0, 10, 20, 30]
    encode, drawn = tokenizer_of(data), set()
    for step in range(40):  # training draws one of the captions, evaluation takes the first
        batch = train_rows(step, source, data, 0, np.array([0]))
        assert batch["image"].shape == (1, 4, 4, 3)
        drawn.add(batch["text"].tobytes())
    both = [f"{article} {name}{again}" for name in ("ant", "bee", "cow", "dog")
            for article, again in (("a", ""), ("the", " again"))]  # fmt: skip
    assert drawn == {encode([caption])["text"].tobytes() for caption in both}
    np.testing.assert_array_equal(source.read(np.array([1]))["text"], encode(["a bee"])["text"])


BAD = {
    "eel.png": png(3)[:40],
    "eel.txt": b"an eel",
    "emu.png": png(4),
    "emu.txt": b" \n",
    "fly.png": png(5),
    "fly.txt": b"\xff\xfe\x00",
    "gnu.png": png(6),
    "hen.txt": b"a hen",
}


@pytest.mark.parametrize("shards", [False, True], ids=["folder", "tar"])
def test_what_cannot_be_read_is_listed_and_left_out(
    shards: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path, FILES | BAD, shards)
    skipping = Data(**{**vars(data), "unreadable": "skip"})
    assert len(open_source(skipping, "train")) == 4
    said = caplog.text
    assert "5 of 9 pairs of " in said
    for fault in ("eel.png: is not a readable image", "emu.txt: has no caption", "fly.txt: is not text"):
        assert fault in said
    assert "gnu.png: has no caption beside it" in said and "hen.txt: has no image beside it" in said
    with pytest.raises(UserError, match=r"(gnu|hen).*: has no .* beside it; give both, or give data.unread"):
        open_source(data, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eel", r"eel.png: is not a readable image \(.*\); mend it, or give data.unreadable='skip'"),
        ("emu", r"emu.txt: has no caption; give it one, or give data.unreadable='skip'"),
        ("fly", r"fly.txt: is not text in UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    bad = {key: value for key, value in BAD.items() if key.startswith(name)}
    data = write(tmp_path, {"ant.png": png(0), "ant.txt": b"an ant", **bad}, False)
    with pytest.raises(UserError, match=message) as e:
        open_source(data, "train").read(np.arange(2))
    assert "\n" not in str(e.value)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a", FILES, True)
    with pytest.raises(UserError, match=r"split 'test': .* has train; pairs and shards are looked for in"):
        open_source(data, "test")
    shard = tmp_path / "a" / "train" / "00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1400])
    fresh = {**vars(data), "threads": 1}  # another key of the cache
    with pytest.raises(UserError, match=r"00000.tar: is not a whole tar file \(.*\); copy it again"):
        open_source(Data(**fresh), "train")
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="train has no pairs, such as"):
        open_source(Data(**{**vars(data), "data_dir": str(tmp_path / "b")}), "train")
    twice = write(tmp_path / "c", {**FILES, "ant.jpg": png(1)}, False)
    with pytest.raises(UserError, match=r"ant.png: has the name of .*ant.jpg; give each pair its own"):
        open_source(twice, "train")
    with pytest.raises(UserError, match="data_dir=None: name='pairs' needs the folder"):
        Data(name="pairs")
    with pytest.raises(UserError, match="unreadable='skip': only read with name='pairs'"):
        Data(unreadable="skip")
    with pytest.raises(UserError, match="image_size=None: openmoji is drawn at any size"):
        Data(name="openmoji")


def test_a_bad_caption_file_is_not_laid_to_the_vocabulary(tmp_path: Path) -> None:
    data = write(tmp_path, {"ant.png": png(0), "ant.txt": b"\xff"}, False)
    with pytest.raises(UserError, match=r"^[^ ]*ant\.txt: is not text in UTF-8") as e:
        tokenizer_of(data)
    assert not str(e.value).startswith("text.")
