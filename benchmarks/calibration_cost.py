"""What calibration by least squared error costs, for weights and for activations.

For weights these are CPU seconds per million, on the shapes of known models. For an activation they are milliseconds,
whatever the number of values that its observer saw.

Usage: ``python benchmarks/calibration_cost.py [--method mse|mae|lp] [--rounds N] [--compare ROWS]``

``--compare`` also measures the exhaustive search, on so many rows of each model, and how far the errors are apart: the
fast search's over the exhaustive one's, for the sum over all rows and for the worst row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from measuring import table
from numpy.typing import NDArray

from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.calibration.objective import power_objective
from trainable_core.calibration.row_search import search_rows
from trainable_core.calibration.search import GridKind, search
from trainable_core.constants import MIN_THRESHOLD
from trainable_core.enums import QuantizationMethod

Shape = tuple[int, ...]
Float32 = NDArray[np.float32]

RESNET_18: list[Shape] = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    *[shape for n in (128, 256, 512) for shape in [(n, n // 2, 3, 3), *[(n, n, 3, 3)] * 3, (n, n // 2, 1, 1)]],
    (1000, 512),
]
STAGES = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
"""MobileNetV2: expansion, output channels and repetitions of its stages."""

GRIDS = [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM]
BITS = (4, 8)
EXPONENTS = {"mse": 2.0, "mae": 1.0, "lp": 3.0}


def mobilenet_v2() -> list[Shape]:
    """Return the shapes of MobileNetV2's weights."""
    shapes: list[Shape] = [(32, 3, 3, 3)]
    inputs = 32
    for expansion, outputs, repetitions in STAGES:
        for _ in range(repetitions):
            hidden = inputs * expansion
            shapes += [(hidden, inputs, 1, 1)] * (expansion > 1) + [(hidden, 1, 3, 3), (outputs, hidden, 1, 1)]
            inputs = outputs
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


MODELS: dict[str, tuple[list[Shape], int | None]] = {
    "ResNet-18": (RESNET_18, 0),
    "MobileNetV2": (mobilenet_v2(), 0),
    "MobileNetV2, depthwise": ([shape for shape in mobilenet_v2() if shape[1:] == (1, 3, 3)], 0),
    "BERT-base, a block": ([*[(768, 768)] * 4, (3072, 768), (768, 3072)], 0),
    "4096 x 4096": ([(4096, 4096)], 0),
    "BERT-base, embedding": ([(30522, 768)], 0),
    "ResNet-18, per tensor": (RESNET_18, None),
    "4096 x 4096, per tensor": ([(4096, 4096)], None),
    "BERT-base, embedding, per tensor": ([(30522, 768)], None),
}


def weights_of(shapes: list[Shape]) -> list[Float32]:
    """Return weights between normal and Laplace ones, scaled as at the start of training."""
    rng = np.random.default_rng(0)
    draw: list[Callable[..., NDArray[np.float64]]] = [rng.normal, rng.laplace]
    return [
        (draw[i % 2](size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32) for i, shape in enumerate(shapes)
    ]


def cost(weights: list[Float32], axis: int | None, method: str, grid: QuantizationMethod, n_bits: int) -> float:
    """Return the CPU seconds per million weights."""
    started = time.process_time()
    for each in weights:
        calibrate_weights(
            each,
            calibration_method=method,
            quantization_method=grid,
            n_bits=n_bits,
            channels_axis=axis,
            p=EXPONENTS[method],
        )
    return (time.process_time() - started) / sum(each.size for each in weights) * 1e6


def activation_cost(observer: Observer, method: str, grid: QuantizationMethod, n_bits: int) -> float:
    """Return the CPU milliseconds for one activation."""
    started = time.process_time()
    calibrate_activation(
        observer, calibration_method=method, quantization_method=grid, n_bits=n_bits, p=EXPONENTS[method]
    )
    return (time.process_time() - started) * 1e3


def compared(
    weights: list[Float32], method: str, grid: QuantizationMethod, n_bits: int, count: int
) -> tuple[float, float, float]:
    """Return what the exhaustive search costs, and the two ratios of errors, on some rows of each tensor."""
    kind = GridKind(grid, n_bits, signed=True, min_threshold=MIN_THRESHOLD)
    seconds, size, errors = 0.0, 0, []
    for each in weights:
        rows = each.reshape(len(each), -1)
        rows = rows[:: max(len(rows) * len(weights) // count, 1)]
        objective = power_objective(kind, rows, EXPONENTS[method])
        started = time.process_time()
        extremes = kind.extremes(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64))
        exhaustive = search(kind, extremes, objective)
        seconds, size = seconds + time.process_time() - started, size + rows.size
        errors.append(objective(np.stack([search_rows(kind, rows, EXPONENTS[method]), exhaustive])))
    fast, slow = np.concatenate(errors, axis=1)
    return seconds / size * 1e6, fast.sum() / slow.sum(), float((fast / slow).max())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--method", choices=EXPONENTS, default="mse")
    parser.add_argument("--rounds", type=int, default=3, help="times that each cost is measured; the median is shown")
    parser.add_argument("--compare", type=int, default=0, help="rows of each model for the exhaustive search")
    options = parser.parse_known_args()[0]
    header = ["s per million weights", *(f"{grid.name} {n_bits}" for grid in GRIDS for n_bits in BITS)]
    costs, comparisons = [], []
    for model, (shapes, axis) in MODELS.items():
        weights = weights_of(shapes)
        line: list[object] = [model]
        for grid in GRIDS:
            for n_bits in BITS:
                rounds = [cost(weights, axis, options.method, grid, n_bits) for _ in range(options.rounds)]
                line.append(f"{statistics.median(rounds):.3f}")
        costs.append(line)
        print(*line, sep="  ", flush=True)
        if options.compare and axis is not None:
            results = [
                compared(weights, options.method, grid, n_bits, options.compare) for grid in GRIDS for n_bits in BITS
            ]
            names = (f"{model}: exhaustive, s", "errors, sum", "errors, worst row")
            comparisons += [
                [name, *(f"{value:.4f}" for value in values)]
                for name, values in zip(names, zip(*results, strict=True), strict=True)
            ]
    print("", table(header, costs), sep="\n")
    activations: dict[str, Float32] = {"normal": np.float32(np.random.default_rng(0).normal(size=100_000))}
    activations["ReLU"] = np.maximum(activations["normal"], 0)
    lines = []
    for name, values in activations.items():
        observer = Observer()
        observer.update(values)
        medians = [
            statistics.median(activation_cost(observer, options.method, grid, n_bits) for _ in range(options.rounds))
            for grid in GRIDS
            for n_bits in BITS
        ]
        lines.append([name, *(f"{each:.1f}" for each in medians)])
    print("", table(["ms per activation", *header[1:]], lines), sep="\n")
    if comparisons:
        print("", table(["", *header[1:]], comparisons), sep="\n")


if __name__ == "__main__":
    main()
