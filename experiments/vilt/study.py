"""ViLT on pairs of one's own: depth, width and patch against matching accuracy, for a pod."""

from scaling.study.sweep import Study, product

SIZES = [
    {"model.depth": depth, "model.width": width, "model.heads": width // 64}
    for depth, width in ((12, 768), (12, 384), (6, 384))
]

STUDY = Study(
    name="vilt",
    config="configs/vilt.py:B/32",
    sweep=product({"train.seed": [0]}, {"model.patch": [16, 24, 32]}, SIZES),
    metric="val_itm_accuracy",
    title="ViLT on pairs of images and captions",
    question="Does compute buy more matching accuracy in smaller patches, in depth or in width, and what "
    "would the next size reach?",
)
