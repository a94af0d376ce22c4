"""ViLT on 3,953 OpenMoji drawings and their names, on a laptop.

scaling train --config=configs/openmoji_vilt.py:F/8 --workdir=runs/vilt
"""

from ml_collections import ConfigDict


def get_config(variant: str = "F/8") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="vilt", variant=variant, tasks=("itm", "mlm")),
            objective=dict(name="vision_language"),
            data=dict(
                name="openmoji",
                image_size=32,
                batch_size=64,
                text=dict(kind="wordpiece", size=1000, length=16),
            ),
            optimizer=dict(
                learning_rate=3e-3, b2=0.98, weight_decay=0.05, schedule="cosine", warmup="10 %", clip=1.0
            ),
            train=dict(duration="40 epochs"),
            evaluate=dict(
                val=dict(kind="matching", batch_size=250),
                pairs=dict(kind="retrieval", every="100 %", batch_size=250),
            ),
            checkpoint=dict(every="25 %", keep=1),
        )
    )
