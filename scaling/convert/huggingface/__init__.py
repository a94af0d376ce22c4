"""Hugging Face transformers' model folders: config.json and model.safetensors."""
