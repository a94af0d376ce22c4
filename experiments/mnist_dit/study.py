"""Diffusion transformers on MNIST digits: depth, width and patch against sample quality."""

from scaling.study.sweep import Study, product, zip_

STUDY = Study(
    name="mnist_dit",
    config="configs/mnist_dit.py:F/7",
    # Each size is the one before it with one block more, or a third more width. The costliest first, so that
    # two workers finish together; more seeds at the end keep the runs that are done.
    sweep=product(
        {"train.seed": [0], "model.patch": [4, 7, 14]},
        zip_({"model.depth": [4, 4, 3], "model.width": [32, 24, 24]}),
    ),
    metric="fd_mnist",
    title="Diffusion transformers on MNIST digits",
    question="Does compute buy more sample quality in smaller patches, in depth or in width, "
    "and what would the next size reach?",
)
