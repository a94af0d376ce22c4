"""Diffusion transformers on MNIST digits: depth, width and patch against sample quality."""

from scaling.study.sweep import Study, product

STUDY = Study(
    name="mnist_dit",
    config="configs/mnist_dit.py:F/7",
    # The costliest first, so that two workers finish together. More seeds at the end keep the runs that are
    # done.
    sweep=product(
        {"train.seed": [0]}, {"model.patch": [4, 7, 14]}, {"model.depth": [4, 2], "model.width": [32, 24]}
    ),
    metric="fd_mnist",
    title="Diffusion transformers on MNIST digits",
    question="Does compute buy more sample quality in smaller patches, in depth or in width, "
    "and what would the next size reach?",
)
