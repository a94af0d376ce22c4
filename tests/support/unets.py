"""U-Nets of one stage."""

from typing import Any

import numpy as np

from scaling.models import unet

BASE: dict[str, Any] = {"width": 8, "groups": 4, "num_classes": 10, "epsilon": 1e-3}


# One stage each: compiling is most of a test's time.
ONE = {kind: unet.UNet(**BASE, kind=kind, multipliers=(1,), depth=1, attention=(1,), head_width=4, context=12)
       for kind in ("adm", "ldm")}  # fmt: skip


def batch(height: int = 8, width: int = 4, channels: int = 3, size: int = 2) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((size, height, width, channels)).astype(np.float32)
    t = np.array([3.0, 700.0, 40.0], np.float32)[:size]
    return {"x": x, "t": t, "y": np.array([4, 10, 0], np.int32)[:size]}
