"""The model in the artifacts, before any framework: its numbers, and the recipe it is quantized by.

Every number is chosen so that outputs are exact. Grids are powers of two and there are no biases, so a layer's sums are
sums of integers below 2**24 times a power of two: each framework gives the same bits in whatever order it adds them.

What is here belongs to the files in the folders beside it. For a later version's artifacts, add to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

RECIPE: dict[str, Any] = {
    "weights": {"method": "POWER_OF_TWO", "n_bits": 4, "per_channel": True, "training_method": "LSQ"},
    "activations": {"method": "POWER_OF_TWO", "n_bits": 8, "training_method": "LSQ"},
    "calibration": {"weights": "mse", "activations": "minmax"},
    "fold_batch_norm": False,
    "rules": [
        {
            "match": {"name": "head"},
            "weights": {"training_method": "DQA", "candidates": [3, 6]},
            "activations": {"training_method": "STE"},
        }
    ],
}
LEARNING_RATE = 2.0**-4
STEPS = 3
"""Steps of plain SGD on the mean of the squared outputs: the files hold a model whose numbers have moved."""


def numbers(*shape: int) -> Array:
    """Return fixed numbers between -1 and 1 that float32 holds exactly."""
    index = np.arange(np.prod(shape))
    return ((index * 37 % 101 - 50) / 64).astype(np.float32).reshape(shape)


CONV = numbers(4, 3, 3, 3)
"""The convolution's kernel: outputs, inputs, height, width."""
HEAD = numbers(5, 64)
"""The last layer's weight: outputs, inputs; an input is ``16 * channel + 4 * row + column``."""
IMAGES = 2 * numbers(6, 3, 6, 6)
"""What the model is calibrated, trained and tested on: images, channels, rows, columns."""
