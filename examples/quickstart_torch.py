"""From a float model to a deployed 4-bit one, on real digits, in a minute.

Trains a small convolutional network on scikit-learn's digits (1,797 real 8x8 images), wraps it with a recipe,
calibrates, trains it quantized, finalizes it, and shows that the deployed model gives bit for bit what was trained.

    python examples/quickstart_torch.py [--recipe FILE] [--epochs N] [--seed S] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

import trainable_torch

HERE = Path(__file__).parent


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels; a quarter of the data is for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32").reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return train_x, train_y, test_x, test_y


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


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, lr: float, groups: list[dict[str, object]], what: str
) -> None:
    """Train with Adam and a cosine schedule; augments by shifting images up to one pixel."""
    batch = 64
    steps = epochs * ((len(x) + batch - 1) // batch)
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in tqdm(range(epochs), desc=what, disable=None, leave=False):
        for index in torch.randperm(len(x)).split(batch):
            shift = torch.randint(-1, 2, (2,)).tolist()
            inputs = torch.roll(x[index], shift, dims=(2, 3))
            loss = nn.functional.cross_entropy(model(inputs), y[index])
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--recipe", default=HERE / "recipes" / "w4a4_lsq.yaml", type=Path, help="recipe, YAML or JSON")
    parser.add_argument("--epochs", default=25, type=int, help="epochs of quantized training (float training takes 30)")
    parser.add_argument("--seed", default=0, type=int, help="seed of data split, initialization and order")
    parser.add_argument("--out", default="quickstart_torch.json", type=Path, help="where the figures go")
    options = parser.parse_args()

    started = time.perf_counter()
    torch.manual_seed(options.seed)
    train_x, train_y, test_x, test_y = digits(options.seed)

    model = network()
    train(model, train_x, train_y, epochs=30, lr=3e-3, groups=[{"params": list(model.parameters())}], what="float")

    qmodel = trainable_torch.wrap(model, options.recipe)
    trainable_torch.calibrate(qmodel, train_x.split(256))
    calibrated_accuracy = accuracy(qmodel.eval(), test_x, test_y)
    groups = trainable_torch.parameter_groups(qmodel)
    train(qmodel, train_x, train_y, epochs=options.epochs, lr=1e-3, groups=groups, what="quantized")
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
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(trainable_torch.describe(deployed))
    print()
    for name, value in figures.items():
        print(f"{name:22}{value:10.4f}" if isinstance(value, float) else f"{name:22}{value:10d}")
    print(f"\n{options.out} written; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
