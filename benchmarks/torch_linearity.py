"""How wrapping, calibrating, finalizing and a training step's bookkeeping grow with the number of layers.

Linear means: the time per layer stays. Calibration's memory is that of its histograms, whatever the number of batches.

Usage: ``python benchmarks/torch_linearity.py [--rounds N] [--write]``
"""

from __future__ import annotations

import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from measuring import report, table
from recipes import recipe
from torch import nn
from torch_measuring import PART, arguments, conditions

import trainable_torch

LAYERS = (125, 250, 500, 1000)
BATCHES = (4, 32)


def chain(layers: int) -> nn.Module:
    """Return as many linear layers and activations, in blocks of ten."""
    blocks = [
        nn.Sequential(*(part for _ in range(10) for part in (nn.Linear(8, 8), nn.ReLU()))) for _ in range(layers // 10)
    ]
    rest = [nn.Linear(8, 8) for _ in range(layers % 10)]
    return nn.Sequential(OrderedDict((f"block{index}", block) for index, block in enumerate([*blocks, *rest])))


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def peak(batches: int) -> float:
    """Return the most Python and NumPy memory, MiB, that calibrating a wrapped model on so many batches takes."""
    qmodel = trainable_torch.wrap(chain(100), recipe("LSQ", 8))
    tracemalloc.start()
    trainable_torch.calibrate(qmodel, (torch.randn(64, 8) for _ in range(batches)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def main() -> None:
    """Print seconds by number of layers, and calibration's memory by number of batches."""
    options = arguments(__doc__ or "", rounds=1)
    x, rows = torch.randn(64, 8), []
    for layers in LAYERS:
        model = chain(layers)
        wrapping, qmodel = seconds(lambda model=model: trainable_torch.wrap(model, recipe("LSQ", 8)))
        calibrating, _ = seconds(lambda qmodel=qmodel: trainable_torch.calibrate(qmodel, [x]))
        training, _ = seconds(lambda qmodel=qmodel: qmodel(x).sum().backward())
        finalizing, _ = seconds(lambda qmodel=qmodel: trainable_torch.finalize(qmodel))
        describing, _ = seconds(lambda qmodel=qmodel: trainable_torch.describe(qmodel))
        rows.append([layers, wrapping, calibrating, training, finalizing, describing])
    header = ["layers", "wrap, s", "calibrate, s", "training step, s", "finalize, s", "describe, s"]
    memory = table(["batches", "calibration's peak, MiB"], [[count, peak(count)] for count in BATCHES])
    report("torch_linearity", PART, f"{conditions()}.\n\n{table(header, rows)}\n\n{memory}", write=options.write)


if __name__ == "__main__":
    main()
