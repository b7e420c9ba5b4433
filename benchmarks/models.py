"""The models whose training steps are measured: a small residual network and a transformer block."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut.

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    stride : int
        Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(out)) + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """Return a residual network of 10 layers for images of shape (3, 32, 32), ten classes."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = (Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def resnet18() -> nn.Sequential:
    """Return ResNet-18 as He et al. (2016) and torchvision have it, for images of shape (3, 224, 224)."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    widths = (64, 64, 128, 256, 512)
    blocks = [
        block
        for inputs, outputs in pairwise(widths)
        for block in (Block(inputs, outputs, 1 if inputs == outputs else 2), Block(outputs, outputs, 1))
    ]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, each behind a layer norm, with residuals.

    Parameters
    ----------
    width, heads, hidden : int
        Features, attention heads, and features of the feed-forward part.
    """

    def __init__(self, width: int = 256, heads: int = 4, hidden: int = 1024) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gelu, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shape (N, length, width)."""
        parts = self.qkv(self.norm1(x)).chunk(3, 2)  # taken by number: tracers can't unpack
        q, k, v = (parts[number].unflatten(2, (self.heads, -1)).transpose(1, 2) for number in range(3))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        return x + self.down(self.gelu(self.up(self.norm2(x))))


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return each model with a batch for it."""
    return {
        "ResNet-10, 64 channels, batch 8": (resnet(64), torch.randn(8, 3, 32, 32)),
        "ResNet-10, 32 channels, batch 16": (resnet(32), torch.randn(16, 3, 32, 32)),
        "ResNet-18, ImageNet, batch 4": (resnet18(), torch.randn(4, 3, 224, 224)),
        "transformer block, batch 8, length 128": (TransformerBlock(), torch.randn(8, 128, 256)),
    }
