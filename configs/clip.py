"""CLIP as Radford et al. 2021 trained it, on your own pairs: tar shards of images and captions.

    scaling train --config=configs/clip.py:ViT-B/32 --workdir=runs/clip_b32 --config.data.data_dir=/data/pairs

The paper (table 18 and section 2.5) trains for 32 epochs in batches of 32,768 pairs, with random square crops
alone. On its 400 million pairs ViT-B/32 names 63.3 % of ImageNet's validation images zero-shot, and ViT-L/14
75.5 %, after 12 days on 256 V100 (section 2.5). Other pairs give other figures. `data_dir` needs the folders
train and test. Text is cut at 77 tokens, by the vocabulary of the package open_clip_torch (install it with
--no-deps).

`objective.microbatch` lowers a chip's activations to those of fewer pairs, for one more forward pass.

All weights decay except gains and biases, as in the paper and in open_clip up to its version 3.3: tables of
positions and tokens decay too. The rates are those of tables 19 and 20, as recalled.

Differences from the paper and OpenAI's code: the rate rises from 0, an image's transformer is initialised as
the text's, BatchNorm sees the global batch, and arithmetic is bfloat16 with float32 moments.
"""

from ml_collections import ConfigDict

RATES = {"RN50x16": 4e-4, "RN50x64": 3.6e-4, "ViT-L/14": 4e-4}  # the others' is 5e-4
SIDES = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448}  # pixels; the others' is 224


def get_config(variant: str = "ViT-B/32") -> ConfigDict:
    side, crop = SIDES.get(variant, 224), ("center_crop(1)",)
    imagenet = dict(name="tfds", builder="imagenet2012", image_size=side, eval_transforms=crop)
    return ConfigDict(
        dict(
            model=dict(name="clip", variant=variant, dtype="bfloat16", remat="full"),
            objective=dict(name="contrastive", chunk=4096),
            data=dict(
                name="pairs",
                data_dir="pairs",
                image_size=side,
                train_transforms=("random_crop(1)",),
                eval_transforms=crop,
                batch_size=32768,
                text=dict(vocab_file="open_clip:bpe_simple_vocab_16e6.txt.gz", max_length=77),
                workers=16,
            ),
            preprocessing=dict(
                mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
            ),
            optimizer=dict(
                learning_rate=RATES.get(variant, 5e-4),
                b2=0.98 if variant.startswith("ViT") else 0.999,
                eps=1e-6 if variant.startswith("ViT") else 1e-8,
                weight_decay=0.2,
                param_rules=(dict(match="(bias|scale)$", weight_decay=0.0),),
                schedule="cosine",
                warmup="2000 steps",
            ),
            train=dict(duration="32 epochs"),
            evaluators=dict(
                val=dict(name="retrieval", every="10 %", batch_size=1024),
                imagenet=dict(
                    name="zero_shot", every="10 %", data=imagenet, split="validation", classes="imagenet",
                    templates="imagenet", batch_size=1024,
                ),
            ),
        )
    )  # fmt: skip
