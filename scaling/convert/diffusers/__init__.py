"""Hugging Face diffusers' model folders: config.json and diffusion_pytorch_model.safetensors."""

from types import ModuleType

from scaling.convert.diffusers import dit, unet, vae

FAMILIES: dict[str, ModuleType] = {
    "dit": dit,
    "unet": unet,
    "vae": vae,
}
