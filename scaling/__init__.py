"""Scaling studies of vision models in JAX: from a question to a fitted law."""

__version__ = "0.1.0"
