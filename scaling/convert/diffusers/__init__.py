"""Hugging Face diffusers' model folders: config.json and diffusion_pytorch_model.safetensors."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.diffusers import dit, unet, vae

FAMILIES: dict[str, Converter[Any]] = {
    "dit": dit.CONVERTER,
    "unet": unet.CONVERTER,
    "vae": vae.CONVERTER,
}
