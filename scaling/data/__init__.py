"""Data: named sources, one global order of examples, and batches for training and exact evaluation."""

from scaling.data.options import DATASETS, Data, Info, info, open_source, open_views, tokenizer_of
from scaling.data.pipeline import (
    cyclic_batches,
    eval_batches,
    host_batches,
    train_batches,
    view_batches,
)
from scaling.data.text import TextInfo
from scaling.data.transforms import named as named_transform

__all__ = [
    "DATASETS",
    "Data",
    "Info",
    "TextInfo",
    "cyclic_batches",
    "eval_batches",
    "host_batches",
    "info",
    "named_transform",
    "open_source",
    "open_views",
    "tokenizer_of",
    "train_batches",
    "view_batches",
]
