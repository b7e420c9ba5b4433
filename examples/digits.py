"""What the quickstarts share, whatever the framework: the data, the command line and the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 64
FLOAT_EPOCHS = 60
RECIPES = Path(__file__).parent / "recipes"

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


class Digits(NamedTuple):
    """Scikit-learn's digits, 1,797 real images of 8 by 8 pixels; a quarter of them is for testing."""

    train_x: Images
    train_y: Labels
    test_x: Images
    test_y: Labels


def load(seed: int) -> Digits:
    """Return images of shape (N, 8, 8) between 0 and 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
    split = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = split
    return Digits(train_x, train_y, test_x, test_y)


def batches_per_epoch(images: Images) -> int:
    """Return how many whole batches there are; batch norm's statistics would suffer from a small one."""
    return len(images) // BATCH


def batches(images: Images, labels: Labels, *, epochs: int, seed: int) -> Iterator[tuple[Images, Labels]]:
    """Yield the batches of all epochs: in a new order in each, every image shifted by up to one pixel."""
    random = np.random.default_rng(seed)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))  # (N, 3, 3, 8, 8)
    for _ in range(epochs):
        order = random.permutation(len(images))
        for batch in range(batches_per_epoch(images)):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            down, right = random.integers(0, 3, size=(2, BATCH))
            yield windows[chosen, down, right], labels[chosen]


def options(description: str | None, out: str, recipe: str) -> argparse.Namespace:
    """Read the command line: recipe, epochs of quantized training, seed, and the file that the figures go to."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--recipe", default=RECIPES / recipe, type=Path, help="recipe, YAML or JSON")
    help_epochs = f"epochs of quantized training (training in float takes {FLOAT_EPOCHS})"
    parser.add_argument("--epochs", default=30, type=int, help=help_epochs)
    parser.add_argument("--seed", default=0, type=int, help="seed of data split, initialization and order")
    parser.add_argument("--out", default=out, type=Path, help="file that the figures are written to")
    return parser.parse_args()


def report(figures: dict[str, float], quantizers: object, out: Path, seconds: float) -> None:
    """Print what is quantized and the figures, and write the figures as JSON."""
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(quantizers)
    print()
    for name, value in figures.items():
        print(f"{name:22}{value:10d}" if isinstance(value, int) else f"{name:22}{value:10.4f}")
    print(f"\n{out} written; {seconds:.0f} s")
