"""ViViT with a factorised encoder on Kinetics: depth, width and patch against top-1, for a pod."""

from scaling.study.sweep import Study, product

# Of the widths of ViT's Ti, S and B. From scratch: there is no image model to start each of them from.
SIZES = [
    {"model.depth": depth, "model.width": width, "model.heads": width // 64}
    for depth, width in ((12, 768), (12, 384), (6, 384))
]

STUDY = Study(
    name="kinetics_vivit",
    config="configs/vivit.py:B/16x2",
    sweep=product(
        {"train.seed": [0], "train.init_from": [None], "model.attention": ["factorised-encoder"]},
        {"model.patch": [14, 16, 32]},
        SIZES,
    ),
    metric="val_top1",
    title="ViViT on Kinetics 400",
    question="Does compute buy more accuracy in smaller patches, in depth or in width, and what would the "
    "next size reach?",
)
