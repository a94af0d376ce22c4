"""ResNet, ViT and Swin on ImageNet-1k, each by its own recipe, at 224 pixels: for a pod."""

from scaling.study.sweep import Study, chain, product

SIZES = {
    "swin": ["B", "S", "T"],
    "resnet": ["152", "101", "50", "18"],
    "vit": [f"{size}/{patch}" for patch in (16, 32) for size in ("B", "S", "Ti")],
}

STUDY = Study(
    name="imagenet_classifiers",
    config={family: f"configs/{family}.py" for family in SIZES},
    sweep=product(
        {"train.seed": [0]},
        chain(*({"model.name": [family], "model.variant": sizes} for family, sizes in SIZES.items())),
    ),
    metric="val_top1",
    title="ResNet, ViT and Swin on ImageNet",
    question="At the same cost, which family makes the fewest errors, and what would its next size reach?",
)
