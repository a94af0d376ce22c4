"""Vision transformers on MNIST digits: depth, width and patch against accuracy."""

from scaling.study.sweep import Study, product

# The costliest first, so that two workers finish together.
VARIANTS = [f"{size}/{patch}" for size in ("P", "F", "A") for patch in (4, 7, 14)]

STUDY = Study(
    name="mnist_vit",
    config="configs/mnist_vit.py:F/7",
    # More seeds at the end of the list keep the runs that are done.
    sweep=product({"train.seed": [0]}, {"model.variant": VARIANTS}),
    metric="val_top1",
    title="Vision transformers on MNIST digits",
    question="Does compute buy more accuracy in smaller patches, in depth or in width, "
    "and what would the next size reach?",
)
