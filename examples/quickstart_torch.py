"""From a float model to a deployed 4-bit one in PyTorch, on real digits, in a minute.

Trains a small convolutional network in float, wraps it with a recipe, calibrates it, trains it quantized, finalizes it,
and shows that the deployed model gives bit for bit what was trained.

    python examples/quickstart_torch.py [--recipe FILE] [--epochs N] [--seed S] [--out FILE]
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator

import digits
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import trainable_torch


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def network() -> nn.Sequential:
    """Return the float model."""
    return nn.Sequential(
        OrderedDict(
            stem=block(1, 16),
            body1=block(16, 32, stride=2),
            body2=block(32, 32),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(32, 10),
        )
    )


def tensors(images: digits.Images, labels: digits.Labels) -> tuple[Tensor, Tensor]:
    """Return images, with an axis for their one channel, and labels as PyTorch's."""
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)


def train(
    model: nn.Module, data: Iterator[tuple[digits.Images, digits.Labels]], steps: int, optimizer: torch.optim.Optimizer
) -> None:
    """Train with a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for batch in tqdm(data, total=steps, disable=None, leave=False):
        x, y = tensors(*batch)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that a model gets right."""
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Run the six steps and report."""
    options = digits.options(__doc__, "quickstart_torch.json")
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    data = digits.load(options.seed)
    steps = digits.batches_per_epoch(data.train_x)
    train_x, _ = tensors(data.train_x, data.train_y)
    test_x, test_y = tensors(data.test_x, data.test_y)

    model = network()
    batches = digits.batches(data.train_x, data.train_y, epochs=digits.FLOAT_EPOCHS, seed=options.seed)
    train(model, batches, digits.FLOAT_EPOCHS * steps, torch.optim.Adam(model.parameters(), lr=5e-3))

    qmodel = trainable_torch.wrap(model, options.recipe)
    trainable_torch.calibrate(qmodel, train_x.split(256))
    calibrated_accuracy = accuracy(qmodel.eval(), test_x, test_y)
    batches = digits.batches(data.train_x, data.train_y, epochs=options.epochs, seed=options.seed + 1)
    train(qmodel, batches, options.epochs * steps, torch.optim.Adam(trainable_torch.parameter_groups(qmodel), lr=1e-3))
    deployed = trainable_torch.finalize(qmodel)

    with torch.no_grad():
        difference = float((deployed(test_x) - qmodel(test_x)).abs().max())
    figures = {
        "float_accuracy": accuracy(model, test_x, test_y),
        "calibrated_accuracy": calibrated_accuracy,
        "trained_accuracy": accuracy(qmodel, test_x, test_y),
        "deployed_accuracy": accuracy(deployed, test_x, test_y),
        "max_abs_difference": difference,
        "seed": options.seed,
    }
    digits.report(figures, trainable_torch.describe(deployed), options.out, time.perf_counter() - started)


if __name__ == "__main__":
    main()
