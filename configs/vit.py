"""ViT on ImageNet-1k from scratch, after "Better plain ViT baselines" (Beyer et al. 2022, arXiv:2205.01580).

    tfds build imagenet2012 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/vit.py:S/16 --workdir=runs/vit_s16

In the paper S/16 reaches 76.5 % top-1 after 90 epochs, in under 7 hours on a TPU v3-8 (a linear head, as
here, did as well as its hidden layer). It takes 3.2e18 FLOPs, which would be 9 hours of an A100 at 30 % of
its peak. Nothing was measured here. For 300 epochs, 80.0 % there, give --config.train.duration='300
epochs'.

Differences from big_vision's code: GELU is exact and not its tanh form; fixed positions have frequencies
of 10000^(-i / (D/4)) and not i / (D/4 - 1); kernels of queries, keys and values start with half the
variance, and that of patches with 2 / (768 + D) for 1 / 768; a crop's ratio is drawn evenly in its
logarithm; bilinear resizing averages where it shrinks; an evaluated square may lie a pixel off; all of
train is used, not 99 %; Adam's first moment is float32 and arithmetic bfloat16, where it is the other way
about there.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/16") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vit", variant=variant, pool="mean", position_init="sincos", dtype="bfloat16"),
            objective=dict(name="classification", mixup=0.2),
            data=dict(
                name="tfds", builder="imagenet2012", batch_size=1024, image_size=224,
                train_transforms=("random_resized_crop(0.05, bilinear)", "flip", "randaugment"),
                eval_transforms=("center_crop(0.875, box)",), workers=16,
            ),
            optimizer=dict(
                learning_rate=1e-3, warmup="10000 steps", schedule="cosine", weight_decay=0.1,
                grad_clip_norm=1.0,
                param_rules=(
                    dict(match="^positions$", frozen=True),
                    dict(match="(bias|scale|token)$", weight_decay=0.0),
                ),
            ),
            train=dict(duration="90 epochs", log_every=100),
            evaluators=dict(val=dict(name="metrics", split="validation", every="5 epochs", batch_size=1024)),
            checkpoint=dict(every="1 epochs"),
        )
    )  # fmt: skip
