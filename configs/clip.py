"""CLIP as Radford et al. 2021 trained it, on pairs of one's own: tar shards of images and captions.

    scaling train --config=configs/clip.py:ViT-B/32 --workdir=runs/clip_b32 --config.data.data_dir=/data/pairs

Table 18 and section 2.5 of the paper: 32 epochs in batches of 32,768 pairs, random square crops alone. On its
400 million pairs ViT-B/32 names 63.3 % of ImageNet's validation images without having been trained to, and
ViT-L/14 75.5 %, after 12 days on 256 V100 (section 2.5). Other pairs give other figures. `data_dir` needs
the folders train and test. Text is cut at 77 tokens, by the vocabulary that the package open_clip_torch has
(install it with --no-deps).

`microbatch` makes a chip's activations those of fewer pairs, at the price of one more forward pass.
"""

from ml_collections import ConfigDict

RATES = {"RN50": 5e-4, "RN101": 5e-4, "RN50x4": 5e-4, "ViT-B/32": 5e-4, "ViT-B/16": 5e-4, "ViT-L/14": 4e-4}


def get_config(variant: str = "ViT-B/32") -> ConfigDict:
    imagenet = dict(name="tfds", builder="imagenet2012", image_size=224, eval_transforms=("center_crop(1)",))
    return ConfigDict(
        dict(
            model=dict(family="clip", variant=variant, dtype="bfloat16", remat="full"),
            objective=dict(name="contrastive", chunk=4096),
            data=dict(
                name="pairs",
                data_dir="pairs",
                image_size=288 if variant == "RN50x4" else 224,
                augment=("random_resized_crop",),
                eval_transforms=("center_crop(1)",),
                batch_size=32768,
                text=dict(vocabulary="open_clip:bpe_simple_vocab_16e6.txt.gz", length=77),
                workers=16,
            ),
            optimizer=dict(
                learning_rate=RATES.get(variant, 5e-4),
                b2=0.98 if variant.startswith("ViT") else 0.999,
                eps=1e-6 if variant.startswith("ViT") else 1e-8,
                weight_decay=0.2,
                schedule="cosine",
                warmup="2000 steps",
            ),
            train=dict(duration="32 epochs"),
            evaluate=dict(
                val=dict(kind="retrieval", every="10 %", batch_size=1024),
                imagenet=dict(
                    kind="zero_shot", every="10 %", data=imagenet, split="validation", classes="imagenet",
                    templates="imagenet", batch_size=1024,
                ),
            ),
        )
    )  # fmt: skip
