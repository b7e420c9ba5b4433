"""Forward and backward of one fake quantization, as a multiple of copying the input and the gradient once.

Where numba is installed (``trainable-torch[speed]``), both kinds of kernels are measured, in the same rounds.

Usage: ``python benchmarks/torch_kernels.py [--rounds N] [--write]``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from columns import BITS, COLUMNS, METHODS
from measuring import interleaved, report, table
from torch import Tensor
from torch_measuring import PART, arguments, conditions, without_numba

from trainable_torch.kernels import native

SHAPES = {
    "act": [(32, 64, 28, 28), (16, 256, 28, 28), (8, 512, 768), (32, 64, 56, 56)],
    "weight": [(256, 256, 3, 3), (512, 512, 3, 3), (768, 768), (3072, 768)],
}
CHANNELS = 0
"""The axis of a weight's output channels."""


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
    for column in COLUMNS:
        cells: dict[tuple[str, str], list[float]] = {key: [] for key in medians}
        for shape in SHAPES[column.target]:
            x, upstream = torch.randn(shape), torch.randn(shape)
            for n_bits in BITS:
                runs = {}
                for method in METHODS:
                    run = step(column.quantizer("torch", method, n_bits, shape, CHANNELS), x, upstream)
                    for kind in kinds:
                        runs[kind, method.name] = run if kind == "with numba" else without_numba(run)
                for key, ratio in interleaved(floor(x, upstream), runs, options.rounds).items():
                    cells[key].append(ratio)
        for key, ratios in cells.items():
            medians[key].append(statistics.median(ratios))
    rows: list[list[object]] = [["target", *(column.aim for column in COLUMNS)]]
    for kind in kinds:
        rows += [[f"{method.name}, {kind}", *medians[kind, method.name]] for method in METHODS]
        symmetric = medians[kind, METHODS[0].name]
        for method in METHODS[1:]:
            ratios = [value / base for value, base in zip(medians[kind, method.name], symmetric, strict=True)]
            rows.append([f"{method.name} / SYMMETRIC, {kind}", *ratios])
    text = f"{conditions()}; medians over {len(SHAPES['act'])} shapes, {BITS} bits, {options.rounds} rounds.\n\n"
    report("torch_kernels", PART, text + table(["", *map(str, COLUMNS)], rows), write=options.write)


if __name__ == "__main__":
    main()
