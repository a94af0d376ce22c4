"""What is compared: a config of this package, and the same model in `pytorch.py`."""

from dataclasses import dataclass
from typing import Any

FLOW = ("objective.path='straight'", "objective.prediction='v'", "model.learn_sigma=False")
VIT = ("objective.mixup=0.0", "optimizer.grad_clip_norm=None", "optimizer.warmup='0 steps'",
       "optimizer.param_rules=()", "model.pool='token'", "model.position_init='normal'")  # fmt: skip
LATENT, IMAGE = dict(side=32, channels=4), dict(side=224, channels=3)
SMALL = dict(width=384, depth=12, heads=6)


@dataclass(frozen=True)
class Case:
    config: str
    overrides: tuple[str, ...]
    torch: dict[str, Any]


CASES = {
    "DiT-S/2": Case("configs/dit.py:S/2", FLOW, dict(family="dit", patch=2, **SMALL, **LATENT)),
    "DiT-S/4": Case("configs/dit.py:S/4", FLOW, dict(family="dit", patch=4, **SMALL, **LATENT)),
    "ViT-S/16": Case("configs/vit.py:S/16", VIT, dict(family="vit", patch=16, **SMALL, **IMAGE)),
    "ResNet-50": Case("configs/resnet.py:50", (), dict(family="resnet", **IMAGE)),
    # For a GPU.
    "DiT-XL/2": Case(
        "configs/dit.py:XL/2", (*FLOW, "model.remat='dots'"),
        dict(family="dit", patch=2, width=1152, depth=28, heads=16, **LATENT),
    ),
    "ViT-L/16": Case(
        "configs/vit.py:L/16", (*VIT, "model.remat='dots'"),
        dict(family="vit", patch=16, width=1024, depth=24, heads=16, **IMAGE),
    ),
}  # fmt: skip
ON_A_CPU = ("DiT-S/2", "DiT-S/4", "ViT-S/16", "ResNet-50")
