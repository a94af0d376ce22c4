"""ViT on CIFAR-10 from scratch, as a model and as the feature space of `fd_cifar10`.

    tfds build cifar10 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/cifar10_vit.py:S/4 --workdir=runs/cifar10_classifier

Hours and accuracy were not measured.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/4") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vit", variant=variant, pool="mean", dtype="bfloat16"),
            objective=dict(name="classification", label_smoothing=0.1, mixup=0.2),
            data=dict(
                name="tfds",
                builder="cifar10",
                batch_size=512,
                train_transforms=("pad_crop", "flip"),
                threads=8,
            ),
            optimizer=dict(
                learning_rate=1e-3, warmup="5 %", schedule="cosine", weight_decay=0.05, grad_clip_norm=1.0
            ),
            train=dict(duration="200 epochs"),
            evaluators=dict(val=dict(name="metrics", every="5 %")),
        )
    )
