"""Strict by default: eight virtual devices, strict dtypes, no silent rank promotion."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
# Making code is most of what tests do: not in parts, and where XLA still can, the old way, it takes half.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10.")
)
os.environ["HF_HUB_OFFLINE"] = "1"

# Compiled code is kept for the session: its workers and the processes they start compile most things once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="scaling-tests-")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what small tests do

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
