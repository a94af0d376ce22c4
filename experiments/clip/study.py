"""CLIP on pairs of one's own: depth, width and patch against retrieval, for a pod."""

from scaling.study.sweep import Study, product

# Both towers of a size have its depth; heads are 64 wide, as in the paper's table 20.
SIZES = [
    {"model.depth": depth, "model.width": width, "model.heads": width // 64,
     "model.text_depth": depth, "model.text_width": text, "model.text_heads": text // 64}
    for depth, width, text in ((12, 768, 512), (12, 384, 384), (6, 384, 384))
]  # fmt: skip

STUDY = Study(
    name="clip",
    config="configs/clip.py:ViT-B/32",
    sweep=product({"train.seed": [0]}, {"model.patch": [14, 16, 32]}, SIZES),
    metric="val_i2t_r1",
    title="CLIP on pairs of images and captions",
    question="Does compute buy better retrieval in smaller patches, in depth or in width, and what would "
    "the next size reach?",
)
