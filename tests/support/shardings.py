"""Where batches lie, for tests of the data alone."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def sharding(*shape: int) -> NamedSharding:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
