"""CLIP on OpenMoji drawings and their names: depth, width and patch against retrieval."""

from scaling.study.sweep import Study, product

# The costliest first, so that two workers finish together.
VARIANTS = [f"ViT-{size}/{patch}" for patch in (4, 8, 16) for size in ("N", "P", "F")]

STUDY = Study(
    name="openmoji_clip",
    config="configs/openmoji_clip.py:ViT-N/8",
    sweep=product(
        {
            # More seeds at the end of the list keep the runs that are done.
            "train.seed": [0],
            "train.duration": ["200 steps"],  # two thirds of the config's
            "model.variant": VARIANTS,
        }
    ),
    metric="val_i2t_r1",
    title="CLIP on OpenMoji drawings and their names",
    question="Does compute buy better retrieval of new combinations in smaller patches, in depth or in "
    "width, and what would the next size reach?",
)
