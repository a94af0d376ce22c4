"""ViLT on OpenMoji drawings and their names: depth, width and patch against matching accuracy."""

from scaling.study.sweep import Study, product

# The costliest first, so that two workers finish together.
VARIANTS = [f"{size}/{patch}" for patch in (4, 8, 16) for size in ("P", "F", "A")]

STUDY = Study(
    name="openmoji_vilt",
    config="configs/openmoji_vilt.py:F/8",
    sweep=product(
        {
            # More seeds at the end of the list keep the runs that are done.
            "train.seed": [0],
            # A third of the config's examples, in twice as many steps for each.
            "train.duration": ["12 epochs"],
            "data.batch_size": [32],
            "evaluators.pairs.pairs": [100],
            "model.variant": VARIANTS,
        }
    ),
    metric="val_itm_accuracy",
    title="ViLT on OpenMoji drawings and their names",
    question="Does compute buy more matching accuracy in smaller patches, in depth or in width, "
    "and what would the next size reach?",
)
