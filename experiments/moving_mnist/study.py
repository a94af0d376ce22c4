"""Joint ViViT on moving MNIST digits: depth, width and patch against the accuracy of the motion."""

from scaling.study.sweep import Study, product, zip_

STUDY = Study(
    name="moving_mnist",
    config="configs/mnist_vivit.py:short",
    # The costliest first, so that two workers finish together; more seeds at the end keep what is done.
    sweep=product(
        {"train.seed": [0], "model.patch": [4, 7, 14]},
        zip_({"model.depth": [2, 4, 2], "model.width": [32, 16, 16], "model.heads": [4, 2, 2]}),
    ),
    metric="val_motion",
    title="Video vision transformers on moving MNIST digits",
    question="Does compute buy more accuracy of the motion in smaller patches, in depth or in width, "
    "and what would the next size reach?",
)
