"""ViLT as Kim et al. 2021 (section 4.2) pre-trained it, on your own pairs: tar shards or folders.

    scaling train --config=configs/vilt.py:B/32 --workdir=runs/vilt_b32

The paper takes 200,000 steps in batches of 4,096 pairs of COCO, Visual Genome, SBU and Conceptual Captions,
with matching and whole hidden words, from a ViT-B/32 of ImageNet, on 64 V100. Fine-tuned, its model answers
71.3 % of VQAv2 (test-dev), and in COCO's test of 5,000 images finds 43.0 % of the images and 61.6 % of the
captions at first place. Other pairs, and no weights to start from, give other figures. Hours and scores of
this file were not measured; training B/32 takes 1.7e20 FLOPs.

The folder `pairs` needs train, test and vocab.txt, the word pieces of BERT uncased. As in the authors' code,
all weights decay except norms and biases. Differences from it: images are squares of the authors' short side;
the rate rises for 10 % of the steps, as in the paper (2,500 steps in the code), and falls as a cosine and
not linearly; there is no dropout (0.1 there) and no alignment of words and patches beside the matching (a
tenth of its weight there); wrong captions are the batch's; the words' output layer is the table that embeds
them; the epsilon of all norms is 1e-12 (1e-6 in the blocks there); and fine-tuning has no RandAugment. For
retrieval, whose head then starts as the logit of a match, go on by

    --workdir=runs/vilt_retrieval --config.train.init_from=runs/vilt_b32 --config.model.tasks="('retrieval',)"
    --config.objective.itm=0 --config.objective.mlm=0 --config.objective.retrieval=1
    --config.data.batch_size=256 --config.train.duration="10 epochs"
"""

from ml_collections import ConfigDict


def get_config(variant: str = "B/32") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vilt", variant=variant, tasks=("itm", "mlm"), dtype="bfloat16", remat="full"),
            objective=dict(name="vision_language"),
            data=dict(
                name="pairs",
                data_dir="pairs",
                image_size=384,
                # What a random crop leaves out may be what the caption names.
                train_transforms=("center_crop(1)",),
                eval_transforms=("center_crop(1)",),
                batch_size=4096,
                text=dict(name="wordpiece", vocab_file="pairs/vocab.txt", max_length=40),
                workers=16,
            ),
            optimizer=dict(
                learning_rate=1e-4, b2=0.98, weight_decay=0.01, schedule="cosine", warmup="10 %",
                param_rules=(dict(match="(bias|scale)$", weight_decay=0.0),),
            ),
            train=dict(duration="200000 steps", log_every=100),
            evaluators=dict(
                val=dict(name="matching", every="5 %", batch_size=1024),
                pairs=dict(name="retrieval", every="100 %", batch_size=1024, pairs=1000),
            ),
            checkpoint=dict(every="1 %"),
        )
    )  # fmt: skip
