"""Peak rates, memory and links of accelerators: one table, with its sources.

MFU and a plan's step time are relative to these peaks; programs reach less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scaling.errors import UserError

TPU_DOCS = "cloud.google.com/tpu/docs"


@dataclass(frozen=True)
class Chip:
    """One accelerator. `gib` are units of 2^30 bytes; rates are per second."""

    name: str  # `jax.Device.device_kind`
    flops: float  # per second, of dense bfloat16 matmuls with float32 sums; a multiply-add is two
    hbm_gib: float  # memory that a program may use, as the compiler or the driver reports it
    hbm_bytes: float  # bytes per second read from or written to main memory
    link_bytes: float  # bytes per second over one link, one direction
    links: int  # links per chip: two for each dimension of the torus; a GPU's to its switch count as one
    clock: float = 0.0  # cycles per second, for the compiler's cycle counts; 0 where it gives none
    wrap: int = 0  # multiple at which a side closes to a ring, see `rings`; 0 where none does
    most: int = 0  # maximum number of chips in a slice made of 4x4x4 cubes
    source: str = ""

    @property
    def switched(self) -> bool:
        """Whether chips are joined by a switch, as GPUs are, and not in a torus."""
        return self.links == 1

    @property
    def dimensions(self) -> int:
        """The number of dimensions of the torus; 1 for a switch."""
        return max(1, self.links // 2)

    def rings(self, torus: Sequence[int]) -> list[bool]:
        """Returns for each dimension of a slice whether it closes to a ring; otherwise it is a line.

        On v4 and v5p all do if all are multiples of 4 (`wrap`); on v5e and v6e each that is a multiple of 16.
        """
        closed = [self.wrap > 0 and side % self.wrap == 0 for side in torus]
        return closed if self.dimensions < 3 else [all(closed)] * len(closed)


# Chips by the name that a topology begins with. Clocks are those at which the matrix units give `flops`.
TPUS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 31.75, 1228e9, 50e9, 6, 1.05e9, 4, 4096, f"{TPU_DOCS}/v4"),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75, 819e9, 50e9, 4, 1.503e9, 16, source=f"{TPU_DOCS}/v5e"),
    "v5p": Chip("TPU v5", 459e12, 95.74, 2765e9, 100e9, 6, 1.75e9, 4, 6144, f"{TPU_DOCS}/v5p"),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25, 1640e9, 100e9, 4, 1.75e9, 16, source=f"{TPU_DOCS}/v6e"),
}
# The sources are the datasheets.
GPUS: dict[str, Chip] = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 312e12, 79.3, 2039e9, 300e9, 1, source="nvidia.com, A100"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 989.4e12, 79.6, 3350e9, 450e9, 1, source="nvidia.com, H100"),
    "h200": Chip("NVIDIA H200", 989.4e12, 139.8, 4800e9, 450e9, 1, source="nvidia.com, H200"),
    "b200": Chip("NVIDIA B200", 2250e12, 178.3, 7700e9, 900e9, 1, source="nvidia.com, HGX B200"),
}
NODE = 8  # number of GPUs that a switch joins
# Slices of up to 256 chips: FLAT for v5e and v6e, which have no larger ones; DEEP for v4 and v5p, whose
# larger ones have sides that are multiples of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
DEEP = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (*TPUS.values(), *GPUS.values())}


def slice_of(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """Returns the chip and the torus of a topology: (16, 16) of "v5e:16x16"; (8,) of "h200:8", a node.

    Raises:
        UserError: if the chip is unknown, or has no slice of these sizes.
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
        noun = "dimensions" if chip.dimensions > 1 else "dimension"
        raise UserError(f"topology={topology!r}: {kind} has {chip.dimensions} {noun}, not {len(shape)}")
    if kind in GPUS and int(shape[0]) > NODE:
        raise UserError(f"topology={topology!r}: one node, of at most {NODE}; what joins nodes is not known")
    torus = tuple(map(int, shape))
    if kind in TPUS and torus not in slices(chip) and not _made_of_cubes(chip, torus):
        shapes = ", ".join("x".join(map(str, sides)) for sides in slices(chip))
        more = ", and larger ones in multiples of 4" if chip.dimensions == 3 else ""
        raise UserError(f"topology={topology!r}: {kind} has slices of {shapes}{more}")
    return chip, torus


def slices(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Returns a chip's slices, smallest first: of TPUs up to 256 chips, of GPUs the parts of a node."""
    return {1: ((1,), (2,), (4,), (NODE,)), 2: FLAT, 3: DEEP}[chip.dimensions]


def _made_of_cubes(chip: Chip, torus: tuple[int, ...]) -> bool:
    cubes = all(side % 4 == 0 for side in torus) and list(torus) == sorted(torus)
    return cubes and math.prod(torus) <= chip.most
