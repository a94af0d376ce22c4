"""What is measured, given features or logits: no models, no data."""
