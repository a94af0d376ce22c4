"""ResNet, ViT and Swin on MNIST digits: sizes of each family against accuracy, on one axis."""

from scaling.study.sweep import Study, chain, product

SIZES = {"swin": ["P", "F", "A"], "resnet": ["P", "F", "A"], "vit": ["N/7", "N/14", "P/14", "F/14"]}

STUDY = Study(
    name="mnist_classifiers",
    config={family: f"configs/mnist_{family}.py" for family in SIZES},
    # More seeds at the end of the list keep the runs that are done.
    sweep=product(
        {"train.seed": [0]},
        chain(*({"model.name": [family], "model.variant": sizes} for family, sizes in SIZES.items())),
    ),
    metric="val_top1",
    title="ResNet, ViT and Swin on MNIST digits",
    question="At the same cost, which family makes the fewest errors, and what would its next size reach?",
)
