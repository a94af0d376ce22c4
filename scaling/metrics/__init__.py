"""Metrics of features or logits: no models, no data."""
