"""A run and its parts: options, build, cost, state, optimiser, checkpoints, run folder, restore."""
