"""How many latents 32x32x4 a second reach the device, from array_record: a table in Markdown on stdout.

    python experiments/speed/inputs.py

A set of random moments is written to a temporary folder and read as a run reads it: shuffled, drawn from the
posterior, batched by 256, placed. It is in the page cache: a disk's own rate is another matter. The posterior
is drawn from on the device, which here may be the CPU that reads.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from timing import spread

from scaling.data import Data, train_batches
from scaling.data.sources.latents import MANIFEST, Encoding, Latents, LatentSource, ShardWriter, Split
from scaling.files import write_json
from scaling.parallel import sharding
from scaling.parallel.mesh import Mesh

EXAMPLES, BATCH = 20_000, 256
READERS = ({"threads": 1}, {"threads": 2}, {"threads": 1, "workers": 1}, {"threads": 1, "workers": 2})


def written(folder: Path, views: int) -> Data:
    """The data section of a set of random moments in a new folder."""
    splits = {"train": Split.of(EXAMPLES)}
    encoding = Encoding("random", 1000, (32, 32, 4), views, splits, "none", "none", {})
    rng, records = np.random.default_rng(0), np.zeros(256, encoding.layout)
    records["moments"] = rng.normal(size=records["moments"].shape)
    folder.mkdir()
    for shard in range(splits["train"].shards):
        count = len(splits["train"].span(shard))
        with ShardWriter(encoding.path(folder, "train", shard)) as writer:
            for start in range(0, count, 256):
                writer.write(records[: count - start])
    write_json(folder / MANIFEST, dataclasses.asdict(Latents(**vars(encoding), scale=0.18)))
    return Data(name="latents", data_dir=str(folder), batch_size=BATCH)


def rate(data: Data, seconds: float, drawn: bool) -> float:
    """Examples a second, once the readers have begun; if not `drawn`, moments as they are placed."""
    transform = LatentSource.device_transform if drawn else lambda source, batch, key: batch
    with mock.patch.object(LatentSource, "device_transform", transform):
        return _rate(data, seconds)


def _rate(data: Data, seconds: float) -> float:
    place = sharding.batch_sharding(sharding.make_mesh(Mesh()), BATCH, "batch")
    with closing(train_batches(data, 0, 0, place)) as batches:  # type: ignore[type-var]
        for _ in range(20):
            jax.block_until_ready(next(batches))
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            jax.block_until_ready(next(batches))
            count += BATCH
        return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores\n")
    print(
        "| views | readers | examples a second, placed | and drawn there |\n" + "| --- " * 4 + "|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        for views in (1, 2):
            data = written(Path(folder) / str(views), views)
            for readers in READERS:
                each = dataclasses.replace(data, **readers)
                shown = " | ".join(
                    spread(rate(each, args.seconds, drawn) for _ in range(args.rounds))
                    for drawn in (False, True)
                )
                print(f"| {views} | {readers} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
