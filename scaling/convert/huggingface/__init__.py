"""Hugging Face transformers' model folders: config.json and model.safetensors."""

from types import ModuleType

from scaling.convert.huggingface import clip, resnet, swin, t5, timesformer, vilt, vit, vivit

FAMILIES: dict[str, ModuleType] = {
    "clip": clip,
    "resnet": resnet,
    "swin": swin,
    "t5": t5,
    "timesformer": timesformer,
    "vilt": vilt,
    "vit": vit,
    "vivit": vivit,
}
