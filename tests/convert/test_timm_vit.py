"""timm's ViT, written plainly, against ours; its names, and files for another resolution."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaling.convert.timm import vit as timm
from scaling.errors import UserError
from scaling.models import vit
from tests.support import originals

X = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
SMALL: dict[str, Any] = {"patch": 4, "width": 24, "depth": 3, "heads": 3}


class ViT(nn.Module):
    """timm's, with a class token, or without and the mean of the patches."""

    def __init__(self, patch: int, width: int, depth: int, heads: int, side: int, token: bool = True) -> None:
        super().__init__()
        self.token = token
        self.patch_embed = originals.patches(width, patch)
        if token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, token + (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, eps=1e-6),
                    "attn": originals.Attention(width, heads),
                    "norm2": nn.LayerNorm(width, eps=1e-6),
                    "mlp": originals.Mlp(width),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        if self.token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        x = self.norm(x)
        return self.head(x[:, 0] if self.token else x.mean(1))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_it_goes_there_and_back_and_gives_the_same(pool: Any) -> None:
    net = ViT(**SMALL, side=12, token=pool == "token")
    model = vit.ViT(**SMALL, resolution=12, pool=pool)
    originals.compare(timm, model, net, {"x": X}, lambda net: net(originals.pixels(X)))


def test_names_at_full_size() -> None:
    with torch.device("meta"):
        net = ViT(16, 768, 12, 12, 224)
    names = originals.names(timm, vit.make("B/16"), vit.inputs("B/16"))
    assert names == sorted(net.state_dict())
    assert len(names) == 152  # of timm's vit_base_patch16_224


@pytest.mark.parametrize(("pool", "extra"), [("token", 1), ("mean", 0)])
def test_a_file_for_another_resolution(pool: Any, extra: int) -> None:
    wanted = vit.ViT(**SMALL, pool=pool, resolution=(20, 8))
    tensors = {"pos_embed": np.zeros((1, extra + 9, 24), np.float32)}
    assert timm.source(wanted, tensors, None) == wanted.clone(resolution=12)
    same = {"pos_embed": np.zeros((1, extra + 10, 24), np.float32)}
    assert timm.source(wanted, same, None) == timm.source(wanted, {}, None) == wanted


def test_a_norm_after_the_mean_is_another_model() -> None:
    message = "fc_norm.weight: the file is of a ViT that averages before its last norm"
    with pytest.raises(UserError, match=re.escape(message)):
        timm.source(vit.ViT(**SMALL, pool="mean"), {"fc_norm.weight": np.ones(24)}, None)
