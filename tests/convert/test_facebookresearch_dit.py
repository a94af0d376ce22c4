"""The authors' DiT, written plainly, against ours; its names, its positions, and other forms refused."""

import argparse
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from scaling.convert import transfer
from scaling.convert.facebookresearch import dit as facebookresearch
from scaling.errors import UserError
from scaling.models import dit
from scaling.training import config
from tests.support import originals, parity

SMALL: dict[str, Any] = {"patch": 2, "width": 24, "depth": 3, "heads": 3}
RNG = np.random.default_rng(0)
INPUTS = {
    "x": RNG.standard_normal((2, 6, 6, 3)).astype(np.float32),
    "t": np.array([3, 700], np.float32),
    "y": np.array([4, 10], np.int32),
}


def sines(places: torch.Tensor, width: int) -> torch.Tensor:
    """[N] -> [N, width]: all sines, then all cosines."""
    angles = places[:, None] * 10000.0 ** -(torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class DiT(nn.Module):
    """With adaLN-Zero; `outputs` are the channels in, or twice as many with learned variances."""

    def __init__(
        self,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        side: int,
        classes: int,
        inputs: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.x_embedder = originals.patches(width, patch, inputs)
        table = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": table})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        place = torch.arange((side // patch) ** 2)
        across, down = place % (side // patch), place // (side // patch)
        halves = [sines(each.double(), width // 2) for each in (across, down)]
        self.register_buffer("pos_embed", torch.cat(halves, dim=1)[None].float())
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn": originals.Attention(width, heads),
                    "mlp": originals.Mlp(width, "tanh"),
                    "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
                }
            )
            for _ in range(depth)
        )
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * outputs),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, H, W, outputs]."""
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        sine, cosine = sines(t, 256).chunk(2, dim=1)
        c = self.t_embedder["mlp"](torch.cat([cosine, sine], 1)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            m = block["adaLN_modulation"](c).chunk(6, dim=1)
            x = x + m[2][:, None] * block["attn"](modulated(x, m[0], m[1]))
            x = x + m[5][:, None] * block["mlp"](modulated(x, m[3], m[4]))
        x = modulated(x, *self.final_layer["adaLN_modulation"](c).chunk(2, dim=1))
        x = self.final_layer["linear"](x)
        rows, p = math.isqrt(x.shape[1]), self.patch
        image = x.new_zeros(len(x), rows * p, rows * p, x.shape[2] // p**2)
        for n in range(rows * rows):  # a token's features are its pixels in reading order, channels fastest
            for i in range(p * p):
                pixel = x[:, n].unflatten(1, (p * p, -1))[:, i]
                image[:, n // rows * p + i // p, n % rows * p + i % p] = pixel
        return image


def test_it_goes_there_and_back_and_gives_the_same() -> None:
    net, model = DiT(**SMALL, side=6, classes=10, inputs=3, outputs=6), dit.DiT(**SMALL, num_classes=10)
    t, y = torch.from_numpy(INPUTS["t"]).double(), torch.from_numpy(INPUTS["y"]).long()
    originals.compare(
        facebookresearch, model, net, INPUTS, lambda net: net(originals.pixels(INPUTS["x"]), t, y)
    )


def test_names_at_full_size() -> None:
    with torch.device("meta"):
        net = DiT(2, 1152, 28, 16, 32, 1000, 4, 8)
    names = originals.names(facebookresearch, dit.make("XL/2"), dit.inputs("XL/2"))
    assert names == sorted(net.state_dict())
    assert len(names) == 28 * 10 + 12  # of DiT-XL-2-256x256.pt


def test_a_training_checkpoint_becomes_a_run_and_opens_there_again(tmp_path: Path) -> None:
    """The tiny config's model, with the EMA beside the arguments of training, as the authors save it."""
    cfg = config.load(str(Path(__file__).parents[1] / "support/tiny_dit.py"))
    net = DiT(patch=4, width=16, depth=2, heads=2, side=8, classes=10, inputs=1, outputs=1)
    parity.randomise(net)
    torch.save({"ema": net.state_dict(), "args": argparse.Namespace(lr=1e-4)}, tmp_path / "dit.pt")
    assert transfer.import_run("facebookresearch", tmp_path / "dit.pt", cfg, tmp_path / "run") == []
    transfer.export_run("facebookresearch", tmp_path / "run", tmp_path / "back")
    assert {file.name for file in (tmp_path / "back").iterdir()} == {"model.safetensors", "SHA256SUMS"}
    back, before = load_file(tmp_path / "back/model.safetensors"), originals.tensors(net)
    net.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in back.items()}, strict=True)
    assert all(np.array_equal(back[name], before[name]) for name in back if name != "pos_embed")


def test_positions_are_checked_and_not_read() -> None:
    model, net = dit.DiT(**SMALL, num_classes=10), DiT(**SMALL, side=10, classes=10, inputs=3, outputs=6)
    table = originals.tensors(net)["pos_embed"]  # of another resolution, for which ours computes it too
    for type_ in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert facebookresearch.source(model, {"pos_embed": table.astype(type_)}, None) == model
    assert facebookresearch.source(model, {}, None) == model
    for other in (table + 0.01, table[:, 1:], table[0], table[..., :12]):
        with pytest.raises(UserError, match=r"pos_embed: is not DiT's table of sines and cosines"):
            facebookresearch.source(model, {"pos_embed": other}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block": "in-context"},
            r"model\.block=in-context: must be adaln-zero, the only one in this format",
        ),
        ({"qk_norm": True}, r"model\.qk_norm=True: must be False"),
    ],
)
def test_other_forms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        facebookresearch.table(dit.DiT(**SMALL, **options))


def test_an_input_that_is_not_square_has_no_form() -> None:
    x = jax.ShapeDtypeStruct((1, 6, 8, 3), np.float32)
    with pytest.raises(UserError, match="must be square for this format; the input has 3x4 patches"):
        facebookresearch.buffers(dit.DiT(**SMALL), {"x": x})
