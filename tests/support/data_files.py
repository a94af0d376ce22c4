"""Small data sets as files: idx, and images with captions."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from scaling.data import Data
from scaling.data.text import Text


def write_idx(path: Path, values: np.ndarray, pack: bool) -> None:
    raw = np.array([0x0800 + values.ndim, *values.shape], ">i4").tobytes() + values.tobytes()
    path = path.with_name(path.name + ".gz") if pack else path
    path.write_bytes(gzip.compress(raw) if pack else raw)


def png(shade: int, size: tuple[int, int] = (6, 5)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


FILES = {
    f"{name}.{kind}": content
    for i, name in enumerate(("ant", "bee", "cow", "dog"))
    for kind, content in (("png", png(10 * i)), ("txt", f"a {name}\nthe {name} again".encode()))
}


def write(folder: Path, files: dict[str, bytes], shards: bool) -> Data:
    """A training split of these files, loose or in two shards."""
    split = folder / "train"
    split.mkdir(parents=True)
    if shards:
        for i in range(2):
            with tarfile.open(split / f"{i:05d}.tar", "w") as tar:
                for name in sorted(files)[i * len(files) // 2 : (i + 1) * len(files) // 2]:
                    member = tarfile.TarInfo(name)
                    member.size = len(files[name])
                    tar.addfile(member, io.BytesIO(files[name]))
    else:
        for name, content in files.items():
            (split / name).parent.mkdir(parents=True, exist_ok=True)
            (split / name).write_bytes(content)
    crop, text = ("center_crop",), Text(vocab_size=600, max_length=24)
    return Data(
        name="pairs",
        data_dir=str(folder),
        image_size=4,
        train_transforms=crop,
        eval_transforms=crop,
        text=text,
    )
