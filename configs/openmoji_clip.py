"""CLIP on 3,953 OpenMoji drawings and their names, on a laptop.

scaling train --config=configs/openmoji_clip.py:ViT-M/4 --workdir=runs/clip

"""

from ml_collections import ConfigDict


def get_config(variant: str = "ViT-M/4") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="clip", variant=variant),
            objective=dict(name="contrastive"),
            data=dict(
                name="openmoji",
                image_size=32,
                batch_size=256,
                text=dict(kind="clip", size=1000, length=16),
            ),
            optimizer=dict(
                learning_rate=1e-3, b2=0.98, weight_decay=0.1, schedule="cosine", warmup="10 %", clip=1.0
            ),
            train=dict(duration="600 steps"),
            evaluate=dict(
                val=dict(kind="retrieval", batch_size=250),
                tones=dict(
                    kind="zero_shot",
                    data=dict(name="openmoji_tones"),
                    classes=tuple(
                        f"{tone} skin tone"
                        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
                    ),
                ),
            ),
        )
    )
