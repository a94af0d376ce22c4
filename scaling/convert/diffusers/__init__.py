"""Hugging Face diffusers' model folders: config.json and diffusion_pytorch_model.safetensors."""
