"""Everything that happens to one run: training loop, evaluation, encoding, warm start, weight import."""
