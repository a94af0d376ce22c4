"""The same models and training steps in PyTorch, written the usual way: what `step.py` compares with.

Fused q, k, v and `scaled_dot_product_attention`; images are [B, C, H, W], for convolutions in channels-last
memory; fused optimisers; averages by one foreach call. On a GPU bfloat16 comes by autocast.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, h, N, d]
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(x.transpose(1, 2).reshape(batch, tokens, width))


def mlp(width: int, approximate: str) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention, self.mlp = Attention(width, heads), mlp(width, "none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, patch: int, width: int, depth: int, heads: int, side: int, channels: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaLNBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, heads), mlp(width, "tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    def __init__(self, patch: int, width: int, depth: int, heads: int, side: int, channels: int) -> None:
        super().__init__()
        self.size, self.grid = patch, side // patch
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.register_buffer("positions", torch.randn(1, self.grid**2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions  # [B, N, D]
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)
        angles = 1000 * t[:, None] * frequencies[None]
        c = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, 1)
        x = self.head(modulate(self.norm(x), shift, scale))
        x = x.view(batch, self.grid, self.grid, self.size, self.size, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        same = inside == out and stride == 1
        shortcut = [] if same else [nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, inside = [], 64
        for i, depth in enumerate((3, 4, 6, 3)):
            for j in range(depth):
                blocks.append(Bottleneck(inside, 64 * 2**i, 2 if i and not j else 1))
                inside = 256 * 2**i
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def classification(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda image, label: F.cross_entropy(model(image), label)


def flow(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Flow matching on a straight path, with labels dropped."""

    def loss(x: Tensor, label: Tensor) -> Tensor:
        t, noise = torch.rand(len(x), device=x.device), torch.randn_like(x)
        at = t[:, None, None, None]
        label = torch.where(torch.rand(len(x), device=x.device) < 0.1, 1000, label)
        return F.mse_loss(model((1 - at) * x + at * noise, t, label).float(), noise - x)

    return loss


def step(
    shape: dict[str, Any], batch: int, dtype: str, *, compiled: bool
) -> tuple[int, Callable[[int], float]]:
    """(parameters, `run(steps) -> loss`) of the training of `shape`: "family", "side", "channels", sizes."""
    torch.manual_seed(0)
    shape = dict(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family, side, channels = shape.pop("family"), shape["side"], shape["channels"]
    if family == "resnet":
        model: nn.Module = ResNet50().to(device, memory_format=torch.channels_last)
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    else:
        model = {"dit": DiT, "vit": ViT}[family](**shape).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, fused=True)
    loss_of = flow(model) if family == "dit" else classification(model)
    loss_of = torch.compile(loss_of) if compiled else loss_of
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters] if family == "dit" else []
    image = torch.randn(batch, channels, side, side, device=device)
    if family == "resnet":
        image = image.to(memory_format=torch.channels_last)
    label = torch.randint(1000, (batch,), device=device)

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(image, label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if average:
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
        return float(loss.detach())  # waits for the device

    return sum(p.numel() for p in parameters), run
