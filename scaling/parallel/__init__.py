"""Where a run runs: mesh, sharding rules, tracing, attention kernels, multi-host start-up."""
