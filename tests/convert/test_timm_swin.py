"""timm's Swin, written plainly, against ours; its names, and what timm's own would not do alike."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from scaling.convert.microsoft import swin as microsoft
from scaling.convert.timm import swin as timm
from scaling.errors import UserError
from scaling.models import swin
from tests.support import originals

SMALL: dict[str, Any] = {"patch": 2, "width": 8, "depths": (2, 4), "heads": (1, 2), "window": 4}
X = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def test_it_goes_there_and_back_and_gives_the_same() -> None:
    net, model = originals.Swin(True, **SMALL, side=16), swin.Swin(**SMALL)
    originals.compare(timm, model, net, {"x": X}, lambda net: net(originals.pixels(X)))


def test_names_at_full_size() -> None:
    with torch.device("meta"):
        net = originals.Swin(True, 4, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224)
    names = originals.names(timm, swin.make("T"), swin.inputs("T"))
    assert names == sorted(net.state_dict())
    assert len(names) == 173  # of timm's swin_tiny_patch4_window7_224
    assert {"layers.1.downsample.reduction.weight", "head.fc.bias"} <= set(names)


def test_the_window_is_read_from_the_tables() -> None:
    net, model = originals.Swin(True, **SMALL, side=16), swin.Swin(**SMALL)
    assert timm.source(model.clone(window=7), originals.tensors(net), None) == model


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((16, 24), r"model\.window=4: must divide the map of every stage .* and stage 2 has 4x6 tokens"),
        ((18, 16), "stage 1 has 9x8 tokens"),
        ((8, 8), "stage 2 has 2x2 tokens"),
        ((16, 32), r"model\.window=4: timm shifts windows on a map of 4x8 tokens"),
    ],
)
def test_what_timm_would_compute_otherwise_is_not_exported(sides: Any, message: str) -> None:
    x = jax.ShapeDtypeStruct((1, *sides, 3), np.float32)
    with pytest.raises(UserError, match=message):
        timm.buffers(swin.Swin(**SMALL), {"x": x})


def test_microsofts_masks_for_a_map_that_is_not_square() -> None:
    """A stage as large as the window along one side is not shifted there, as it is not in ours."""
    x = jax.ShapeDtypeStruct((1, 16, 32, 3), np.float32)
    masks = {n: t.shape for n, t in microsoft.buffers(swin.Swin(**SMALL), {"x": x}).items() if "mask" in n}
    assert masks == {"layers.0.blocks.1.attn_mask": (8, 16, 16)}
