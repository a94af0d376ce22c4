"""Hugging Face transformers' model folders: config.json and model.safetensors."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.huggingface import clip, resnet, swin, t5, timesformer, vilt, vit, vivit

FAMILIES: dict[str, Converter[Any]] = {
    "clip": clip.CONVERTER,
    "resnet": resnet.CONVERTER,
    "swin": swin.CONVERTER,
    "t5": t5.CONVERTER,
    "timesformer": timesformer.CONVERTER,
    "vilt": vilt.CONVERTER,
    "vit": vit.CONVERTER,
    "vivit": vivit.CONVERTER,
}
