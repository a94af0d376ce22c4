"""Folders of latents with moments from a seed, where no autoencoder is needed."""

import dataclasses
from pathlib import Path

import numpy as np

from scaling.data import Data
from scaling.data.sources.latents import MANIFEST, Encoding, Latents, ShardWriter, Split
from scaling.files import write_json


def write_latents(
    folder: Path,
    shape: tuple[int, int, int] = (4, 4, 3),
    views: int = 2,
    train: int = 50,
    test: int = 11,
    scale: float = 0.5,
    held_out: str = "test",
) -> dict[str, np.ndarray]:
    """Writes a whole folder; returns the records of each split."""
    splits = {"train": Split.of(train), held_out: Split.of(test)}
    section = dataclasses.asdict(Data(name="mnist"))
    encoding = Encoding("mnist", 10, shape, views, splits, "runs/vae", "0" * 16, section)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = {}
    for name, split in splits.items():
        records[name] = np.zeros(split.examples, encoding.layout)
        records[name]["label"] = np.arange(split.examples) % 10
        records[name]["moments"] = rng.normal(size=(split.examples, views, 2, *shape))
        for shard in range(split.shards):
            span = split.span(shard)
            with ShardWriter(encoding.path(folder, name, shard)) as writer:
                writer.write(records[name][span.start : span.stop])
    write_json(folder / MANIFEST, dataclasses.asdict(Latents(**vars(encoding), scale=scale)))
    return records
