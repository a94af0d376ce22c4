"""ViT on ImageNet-1k from scratch, after "Better plain ViT baselines" (Beyer et al. 2022, arXiv:2205.01580).

    tfds build imagenet2012 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/vit.py:S/16 --workdir=runs/vit_s16

The paper's S/16 reaches 76.5 % top-1 in 90 epochs with RandAugment; this recipe has mixup, crops and
flips only, and its hours and accuracy are not measured.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/16") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="vit", variant=variant, pool="mean", dtype="bfloat16"),
            objective=dict(name="classification", mixup=0.2),
            data=dict(
                name="tfds", builder="imagenet2012", batch_size=1024, image_size=224,
                augment=("random_resized_crop", "flip"), eval_transforms=("center_crop",), workers=16,
            ),
            optimizer=dict(
                learning_rate=1e-3, warmup="10000 steps", schedule="cosine", weight_decay=0.1, clip=1.0
            ),
            train=dict(duration="90 epochs", log_every=100),
            evaluate=dict(val=dict(kind="metrics", split="validation", every="5 epochs", batch_size=1024)),
            checkpoint=dict(every="1 epochs"),
        )
    )  # fmt: skip
