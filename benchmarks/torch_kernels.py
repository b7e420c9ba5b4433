"""Forward and backward of one fake quantization, as a multiple of copying the input and the gradient once.

Where numba is installed (``trainable-torch[speed]``), both kinds of kernels are measured, in the same rounds.

Usage: ``python benchmarks/torch_kernels.py [--rounds N] [--write]``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import interleaved, report, table
from torch import Tensor
from torch_measuring import arguments, conditions, without_numba

from trainable_core import QuantizationMethod, TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_torch.kernels import native
from trainable_torch.quantizers import (
    LsqActivationQuantizer,
    LsqWeightsQuantizer,
    SteActivationQuantizer,
    SteWeightsQuantizer,
)

ACTIVATIONS = [(32, 64, 28, 28), (16, 256, 28, 28), (8, 512, 768), (32, 64, 56, 56)]
WEIGHTS = [(256, 256, 3, 3), (512, 512, 3, 3), (768, 768), (3072, 768)]
BITS = (4, 8)
COLUMNS = {
    "act STE tensor": (SteActivationQuantizer, None),
    "act LSQ tensor": (LsqActivationQuantizer, None),
    "weight STE tensor": (SteWeightsQuantizer, None),
    "weight STE channel": (SteWeightsQuantizer, 0),
    "weight LSQ tensor": (LsqWeightsQuantizer, None),
    "weight LSQ channel": (LsqWeightsQuantizer, 0),
}
TARGETS = (2.0, 4.0, 3.0, 4.0, 6.0, 8.0)
METHODS = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM)


def quantizer(cls: type[Any], method: QuantizationMethod, n_bits: int, shape: tuple[int, ...], axis: int | None) -> Any:
    """Return an initialized quantizer that clips a few per cent of normal numbers."""

    def numbers(value: float) -> Any:
        return value if axis is None else [value * (1 + 0.1 * i / shape[axis]) for i in range(shape[axis])]

    uniform = method is QuantizationMethod.UNIFORM
    params = {RANGE_MIN: numbers(-1.9), RANGE_MAX: numbers(2.2)} if uniform else {THRESHOLD: numbers(2.0)}
    if cls in (SteActivationQuantizer, LsqActivationQuantizer):
        config: Any = TrainableQuantizerActivationConfig(
            activation_quantization_method=method,
            activation_n_bits=n_bits,
            activation_quantization_params=params if uniform else {**params, SIGNED: True},
        )
    else:
        config = TrainableQuantizerWeightsConfig(
            weights_quantization_method=method,
            weights_n_bits=n_bits,
            weights_quantization_params=params,
            weights_per_channel_threshold=axis is not None,
            weights_channels_axis=axis,
        )
    made = cls(config)
    made.initialize_quantization(shape, "x", None)
    return made


def step(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Return forward and backward of a function, the gradients dropped as an optimizer would."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        function(leaf).backward(upstream)
        leaf.grad = None

    return run


def floor(x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Return the copies of input and gradient that no fake quantization can do without."""

    def run() -> None:
        x.clone()
        upstream.clone()

    return run


def main() -> None:
    """Print the six columns for every grid, and the grids' ratios to SYMMETRIC."""
    options = arguments(__doc__ or "", rounds=9)
    kinds = ("with numba", "without numba") if native.compiled() is not None else ("without numba",)
    medians: dict[tuple[str, str], list[float]] = {(kind, method.name): [] for kind in kinds for method in METHODS}
    for cls, axis in COLUMNS.values():
        cells: dict[tuple[str, str], list[float]] = {key: [] for key in medians}
        shapes = ACTIVATIONS if cls in (SteActivationQuantizer, LsqActivationQuantizer) else WEIGHTS
        for shape in shapes:
            x, upstream = torch.randn(shape), torch.randn(shape)
            for n_bits in BITS:
                runs = {}
                for method in METHODS:
                    run = step(quantizer(cls, method, n_bits, shape, axis), x, upstream)
                    for kind in kinds:
                        runs[kind, method.name] = run if kind == "with numba" else without_numba(run)
                for key, ratio in interleaved(floor(x, upstream), runs, options.rounds).items():
                    cells[key].append(ratio)
        for key, ratios in cells.items():
            medians[key].append(statistics.median(ratios))
    rows: list[list[object]] = [["target", *TARGETS]]
    for kind in kinds:
        rows += [[f"{method.name}, {kind}", *medians[kind, method.name]] for method in METHODS]
        symmetric = medians[kind, METHODS[0].name]
        for method in METHODS[1:]:
            ratios = [value / base for value, base in zip(medians[kind, method.name], symmetric, strict=True)]
            rows.append([f"{method.name} / SYMMETRIC, {kind}", *ratios])
    text = f"{conditions()}; medians over {len(ACTIVATIONS)} shapes, {BITS} bits, {options.rounds} rounds.\n\n"
    report("kernels", text + table(["", *COLUMNS], rows), write=options.write)


if __name__ == "__main__":
    main()
