"""Two networks for scikit-learn's digits that train in seconds: depthwise-separable convolutions, and a transformer."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import TransformerBlock
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import digits


def block(convolution: nn.Conv2d) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU."""
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(convolution.out_channels), relu=nn.ReLU()))


def depthwise(conv: Callable[..., nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """Return a network of depthwise-separable convolutions, as MobileNets are, for images of shape (1, 8, 8)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=block(conv(1, 16, 3, padding=1, bias=False)))
    for index, (inputs, outputs, stride) in enumerate([(16, 32, 2), (32, 32, 1), (32, 64, 1)], 1):
        layers[f"depth{index}"] = block(conv(inputs, inputs, 3, stride, 1, groups=inputs, bias=False))
        layers[f"point{index}"] = block(conv(inputs, outputs, 1, bias=False))
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, 10)}
    return nn.Sequential(layers)


class Transformer(nn.Module):
    """Two blocks on the rows of an image of shape (1, 8, 8)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, 2 * width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (N, 10)."""
        x = self.blocks(self.embed(x.flatten(1, 2)) + self.places)
        return self.head(self.norm(x.mean(1)))


def tensors(images: digits.Images, labels: digits.Labels) -> tuple[Tensor, Tensor]:
    """Return images, with an axis for their one channel, and labels as PyTorch's."""
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)


def train(model: nn.Module, data: digits.Digits, epochs: int, seed: int, optimizer: Any) -> nn.Module:
    """Train with a cosine schedule; return the model, in evaluation mode."""
    steps = epochs * digits.batches_per_epoch(data.train_x)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches: Iterator[Any] = digits.batches(data.train_x, data.train_y, epochs=epochs, seed=seed)
    model.train()
    for batch in batches:
        x, y = tensors(*batch)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: digits.Digits) -> float:
    """Return the share of the test images that a model gets right."""
    x, y = tensors(data.test_x, data.test_y)
    return float((model.eval()(x).argmax(1) == y).float().mean())
