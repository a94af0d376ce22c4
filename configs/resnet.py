"""ResNet on ImageNet-1k (He et al. 2016, section 3.4), with the settings of torchvision's first weights.

    tfds build imagenet2012 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/resnet.py:50 --workdir=runs/resnet50

After 90 epochs the top-1 of ResNet-50 is 76.13 %, of 18 69.76 %, of 152 78.31 % (torchvision,
IMAGENET1K_V1). ResNet-50 takes 2.8e18 FLOPs, which would be 8 hours of an A100 at 30 % of its peak. Nothing
was measured here. With a larger batch, raise the rate in proportion and warm up over 5 epochs (Goyal et al.
2017, arXiv:1706.02677, section 2).

Differences from torchvision's reference: the last BatchNorm of a block starts at 0 and not 1 (Goyal et al.,
section 5.1, worth 0.2 to 0.3 %), BatchNorm's statistics are of the global batch and not of a device's 32
images, and arithmetic is bfloat16.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "50") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="resnet", variant=variant, dtype="bfloat16"),
            objective=dict(name="classification"),
            data=dict(
                name="tfds", builder="imagenet2012", batch_size=256, image_size=224,
                train_transforms=("random_resized_crop(bilinear)", "flip"),
                eval_transforms=("center_crop(0.875, bilinear)",), workers=16,
            ),
            preprocessing=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            optimizer=dict(
                name="sgd", learning_rate=0.1, schedule="step", lr_milestones=("30 epochs", "60 epochs"),
                weight_decay=1e-4, weight_decay_mode="l2", param_rules=(),  # of norms and biases, too
            ),
            train=dict(duration="90 epochs", log_every=100),
            evaluators=dict(val=dict(name="metrics", split="validation", every="5 epochs", batch_size=1024)),
            checkpoint=dict(every="1 epochs"),
        )
    )  # fmt: skip
