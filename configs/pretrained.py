"""Any family's weights as they are: to import what others trained, to export it, to help other runs.

    scaling import --format=huggingface --config=configs/pretrained.py:clip/ViT-B/32 \\
        clip-vit-base-patch32 --out=runs/clip_b32
    scaling export runs/clip_b32 --format=stablehlo --out=clip_b32

The variant is FAMILY/VARIANT, both as `scaling models` lists them. There is nothing to train: to train on
from weights, import them with a config that has data and a loss, such as configs/vit.py.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "clip/ViT-B/32") -> ConfigDict:
    family, _, size = variant.partition("/")
    return ConfigDict(
        dict(
            model=dict(name=family, variant=size),
            objective=dict(name="frozen"),
            optimizer=dict(name="sgd"),  # keeps nothing beside the weights
        )
    )
