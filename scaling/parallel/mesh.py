"""The mesh that a config asks for: sizes of its axes, without devices."""

import dataclasses
import math
from dataclasses import dataclass

from scaling.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, for the devices that remain.

    Raises:
        UserError: if a size is neither -1 nor at least 1, or more than one is -1.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"{name}={size}: must be at least 1, or -1 for the devices that remain")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"data={self.data}: only one axis may be -1")

    def over(self, devices: int) -> dict[str, int] | None:
        """Returns the size of each axis over so many devices; None if the sizes do not multiply to them."""
        sizes = dataclasses.asdict(self)
        named = math.prod(size for size in sizes.values() if size != -1)
        resolved = {axis: devices // named if size == -1 else size for axis, size in sizes.items()}
        return resolved if math.prod(resolved.values()) == devices else None

    def elsewhere(self, devices: int) -> "Mesh":
        """Returns the mesh of a run that is restored on so many devices: this one if it fits.

        Otherwise weights are sharded over as many of this mesh's parts as divide the devices.
        """
        if self.over(devices):
            return self
        parts = devices if -1 in (self.fsdp, self.tensor) else self.fsdp * self.tensor
        return Mesh(fsdp=math.gcd(parts, devices))


AXES = tuple(field.name for field in dataclasses.fields(Mesh))
