"""Swin on ImageNet-1k from scratch, with the paper's recipe, DeiT's (Liu et al. 2021, appendix A2.1).

    tfds build imagenet2012 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/swin.py:T --workdir=runs/swin_t

After 300 epochs T reaches 81.2 % top-1, S 83.2 %, B 83.5 % (the released weights). T takes 1.0e19 FLOPs,
which would be 31 hours of an A100 at 30 % of its peak; not measured here. B at 384 pixels (84.5 %) starts
from the weights of 224:

    scaling export runs/swin_b --format=microsoft --out=swin_b
    scaling import --format=microsoft --config=configs/swin.py:B/384 swin_b --out=runs/swin_b384
    scaling train --config=configs/swin.py:B/384 --workdir=runs/swin_b384

Differences from the released code: the rate rises from 0 and falls after the warm-up (as there since 2022;
the released weights' rate fell from the first step), mixing weights are of the global batch and not of a
device's, random erasing fills with uniform bytes and not with normal numbers, and arithmetic is bfloat16.
"""

from ml_collections import ConfigDict

DROP_PATH = {"T": 0.2, "S": 0.3, "B": 0.5}
FINE = {  # the released settings of fine-tuning at 384, for a batch of 1024
    "model": dict(resolution=384, window=12),
    "data": dict(image_size=384, eval_transforms=("resize",)),  # all of the image, whatever its ratio
    "optimizer": dict(learning_rate=4e-5, warmup="5 epochs", weight_decay=1e-8),
    "train": dict(duration="30 epochs"),
}


def get_config(variant: str = "T") -> ConfigDict:
    size = variant.removesuffix("/384")
    config = ConfigDict(
        dict(
            model=dict(name="swin", variant=size, drop_path=DROP_PATH.get(size, 0.2), dtype="bfloat16"),
            objective=dict(name="classification", label_smoothing=0.1, mixup=0.8, cutmix=1.0),
            data=dict(
                name="tfds", builder="imagenet2012", batch_size=1024, image_size=224,
                train_transforms=("random_resized_crop", "flip", "randaugment_deit", "random_erasing"),
                eval_transforms=("center_crop",), workers=16,
            ),
            preprocessing=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            optimizer=dict(
                learning_rate=1e-3, warmup="20 epochs", schedule="cosine", final_lr_ratio=0.01,
                weight_decay=0.05, grad_clip_norm=5.0,
            ),
            train=dict(duration="300 epochs", log_every=100),
            evaluators=dict(val=dict(name="metrics", split="validation", every="5 epochs", batch_size=1024)),
            checkpoint=dict(every="1 epochs"),
        )
    )  # fmt: skip
    if size != variant:
        for section, options in FINE.items():
            config[section].update(options)
    return config
