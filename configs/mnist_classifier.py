"""The classifier whose features measure `fd_mnist`: a ViT on 4,000 MNIST digits.

scaling train --config=configs/mnist_classifier.py --workdir=runs/mnist_classifier
"""

from ml_collections import ConfigDict


def get_config(variant: str = "N/7") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="vit", variant=variant, pool="mean"),
            objective=dict(name="classification", label_smoothing=0.1),
            data=dict(name="mnist", batch_size=64),
            optimizer=dict(learning_rate=2e-3, schedule="cosine", warmup="10 %", weight_decay=0.05, clip=1.0),
            train=dict(duration="10 epochs"),
            evaluate=dict(val=dict(kind="metrics")),
            checkpoint=dict(every="50 %", keep=1),
        )
    )
