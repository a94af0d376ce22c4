"""ResNet on 4,000 MNIST digits, with a linear classifier to beat, on two cores.

    scaling train --config=configs/mnist_resnet.py:F --workdir=runs/mnist_resnet_f

`experiments/mnist_classifiers` compares it with ViT and Swin.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "F") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="resnet", variant=variant),
            objective=dict(name="classification", label_smoothing=0.1),
            data=dict(name="mnist", batch_size=64),
            optimizer=dict(
                learning_rate=1e-2,
                b2=0.95,
                warmup="10 %",
                schedule="cosine",
                weight_decay=0.05,
                grad_clip_norm=1.0,
            ),
            train=dict(duration="10 epochs"),
            evaluators=dict(val=dict(name="metrics"), linear=dict(name="linear", inverse_l2=0.2)),
            checkpoint=dict(every="25 %", keep=1),
        )
    )
