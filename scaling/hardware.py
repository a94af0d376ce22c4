"""What accelerators can do at most: one table, with its sources.

A share of these peaks is what "MFU" and a plan's step time mean. What a chip reaches is less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.errors import UserError

TPU_DOCS = "cloud.google.com/tpu/docs"


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bytes are bytes, `gib` are 2^30 of them, rates are a second's."""

    name: str  # as `jax.Device.device_kind` has it
    flops: float  # dense bfloat16 products with float32 sums; a multiply-add is two
    hbm_gib: float  # that a program may use, as the compiler or the driver reports it
    hbm_bytes: float  # read or written
    link_bytes: float  # over one link, in one direction
    links: int  # of a chip: two for each dimension of the torus; on GPUs those to the switch are one
    clock: float = 0.0  # cycles a second, for the compiler's cycle counts; 0 where it gives none
    wrap: int = 0  # see `rings`
    most: int = 0  # chips of a slice of cubes
    source: str = ""

    @property
    def switched(self) -> bool:
        """Joined by a switch, as GPUs are, and not in a torus."""
        return self.links == 1

    @property
    def dimensions(self) -> int:
        """Of the torus; a switch's is 1."""
        return max(1, self.links // 2)

    def rings(self, torus: Sequence[int]) -> list[bool]:
        """Which dimensions of a slice close to a ring; others are lines.

        Of v4 and v5p all do where all are multiples of 4 (`wrap`), of v5e and v6e those of 16.
        """
        closed = [self.wrap > 0 and side % self.wrap == 0 for side in torus]
        return closed if self.dimensions < 3 else [all(closed)] * len(closed)


# By the name that a topology begins with. Clocks are those at which the matrix units give `flops`.
TPUS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 31.75, 1228e9, 50e9, 6, 1.05e9, 4, 4096, f"{TPU_DOCS}/v4"),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75, 819e9, 50e9, 4, 1.503e9, 16, source=f"{TPU_DOCS}/v5e"),
    "v5p": Chip("TPU v5", 459e12, 95.74, 2765e9, 100e9, 6, 1.75e9, 4, 6144, f"{TPU_DOCS}/v5p"),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25, 1640e9, 100e9, 4, 1.75e9, 16, source=f"{TPU_DOCS}/v6e"),
}
# Sources are the datasheets.
GPUS: dict[str, Chip] = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 312e12, 79.3, 2039e9, 300e9, 1, source="nvidia.com, A100"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 989.4e12, 79.6, 3350e9, 450e9, 1, source="nvidia.com, H100"),
    "h200": Chip("NVIDIA H200", 989.4e12, 139.8, 4800e9, 450e9, 1, source="nvidia.com, H200"),
    "b200": Chip("NVIDIA B200", 2250e12, 178.3, 7700e9, 900e9, 1, source="nvidia.com, HGX B200"),
}
NODE = 8  # GPUs that a switch joins
# Slices of up to 256 chips: of v5e and v6e, which have no larger ones, and of v4 and v5p, whose larger ones
# have sides of multiples of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*TPUS.values(), *GPUS.values())}


def slice_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the torus of "v5e:16x16"; of "h200:8", GPUs of one node, (8,).

    Raises: UserError for a name that is none of these, or sizes that are none of the chip's.
    """
    kind, _, sizes = topology.partition(":")
    shape = sizes.split("x")
    if kind not in {**TPUS, **GPUS} or not all(size.isdecimal() and int(size) > 0 for size in shape):
        raise UserError(
            f"topology={topology!r}: must be of {', '.join(TPUS)}, with sizes, such as v5e:4x4 or v5p:2x2x4, "
            f"or of {', '.join(GPUS)}, with a number, such as h200:8"
        )
    chip = TPUS.get(kind) or GPUS[kind]
    if len(shape) != chip.dimensions:
        said = "dimensions" if chip.dimensions > 1 else "dimension"
        raise UserError(f"topology={topology!r}: {kind} has {chip.dimensions} {said}, not {len(shape)}")
    if kind in GPUS and int(shape[0]) > NODE:
        raise UserError(f"topology={topology!r}: one node, of at most {NODE}; what joins nodes is not known")
    torus = tuple(map(int, shape))
    if kind in TPUS and torus not in slices(chip) and not _cubes(chip, torus):
        there = ", ".join("x".join(map(str, sides)) for sides in slices(chip))
        more = ", and larger ones in multiples of 4" if chip.dimensions == 3 else ""
        raise UserError(f"topology={topology!r}: {kind} has slices of {there}{more}")
    return chip, torus


def slices(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Of TPUs, up to 256 chips, the smallest first; of GPUs, a node in parts."""
    return {1: ((1,), (2,), (4,), (NODE,)), 2: FLAT, 3: DEEP}[chip.dimensions]


def _cubes(chip: Chip, torus: tuple[int, ...]) -> bool:
    cubes = all(side % 4 == 0 for side in torus) and list(torus) == sorted(torus)
    return cubes and math.prod(torus) <= chip.most
