"""Planning a run for hardware that is not here: whether it fits, how long it takes and what it costs."""
