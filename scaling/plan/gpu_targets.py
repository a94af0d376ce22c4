"""Descriptions of GPUs for XLA's compiler, so that it can compile for those that are not here."""

from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from scaling.plan import hardware


@dataclass(frozen=True)
class Target:
    """The properties in which GPUs differ, besides those in `hardware.GPUS`."""

    capability: int  # major number of the compute capability; the minor is 0
    cores: int  # number of streaming multiprocessors
    clock: float  # in GHz
    cache: int  # bytes of L2 cache
    shared: int  # bytes of shared memory per core
    units: int = 128  # float32 units per core


# Sources: NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability; openxla/xla,
# xla/backends/gpu/target_config/specs, as the driver reports them.
TARGETS = {
    "a100": Target(8, 108, 1.41, 41943040, 167936, 64),
    "h100": Target(9, 132, 1.98, 52428800, 233472),
    "h200": Target(9, 132, 1.98, 52428800, 233472),
    "b200": Target(10, 148, 1.965, 132644864, 233472),
}


def devices(name: str, count: int) -> list[Any]:
    """Returns `count` GPUs of one node, as devices to compile for; jax's own errors say if it cannot."""
    target = _target_config(name)
    description = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return list(description.devices)


def _target_config(name: str) -> str:
    """Returns a GPU's `stream_executor.GpuTargetConfigProto`, as text."""
    chip, target = hardware.GPUS[name], TARGETS[name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {target.capability} minor: 0 }}
  core_count: {target.cores}
  fpus_per_core: {target.units}
  clock_rate_ghz: {target.clock}
  l2_cache_size: {target.cache}
  shared_memory_per_core: {target.shared}
  shared_memory_per_block_optin: {target.shared - 1024}
  shared_memory_per_block: 49152
  device_memory_size: {int(chip.hbm_gib * 2**30)}
  memory_bandwidth: {int(chip.hbm_bytes)}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.name}"
"""
