"""A whole training step of a quantized model, and what it keeps for backward, as ratios to the float model.

Forward, backward and SGD; all layers quantized, batch norm kept. Then evaluation, whose weights are quantized once.
Where numba is installed (``trainable-torch[speed]``), both kinds of kernels are measured, in the same rounds.

Usage: ``python benchmarks/torch_steps.py [--rounds N] [--write]``
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from measuring import interleaved, report, table
from models import cases
from recipes import recipe
from torch import Tensor, nn
from torch_measuring import PART, arguments, conditions, kept_bytes, without_numba

import trainable_torch
from trainable_torch.kernels import native

LIMITS = {"STE": ("1.05 / 1.10", "1.5 / 1.6"), "LSQ": ("1.10 / 1.15", "1.5 / 1.6")}


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return forward, backward and a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return run


def evaluation(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward in eval mode without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def quantized(model: nn.Module, x: Tensor, training_method: str, weight_bits: int) -> nn.Module:
    """Return a wrapped and calibrated copy of a model."""
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe(training_method, weight_bits)), [x])


def main() -> None:
    """Print one row per model and quantization."""
    options = arguments(__doc__ or "", rounds=9)
    rows = []
    for name, (model, x) in cases().items():
        models = {(method, bits): quantized(model, x, method, bits) for method in ("STE", "LSQ") for bits in (8, 4)}
        steps = {}
        for key, each in models.items():
            run = training_step(each, x)
            steps[key, True], steps[key, False] = run, without_numba(run)
        ratios = interleaved(training_step(copy.deepcopy(model), x), steps, options.rounds)
        floating = kept_bytes(model, x)
        memory = {key: kept_bytes(each, x) / floating for key, each in models.items()}
        plain = {key: without_numba(partial(kept_bytes, each, x))() / floating for key, each in models.items()}
        calls = {key: evaluation(each.eval(), x) for key, each in models.items()}
        evaluated = interleaved(evaluation(copy.deepcopy(model).eval(), x), calls, options.rounds)
        for key, kept in memory.items():
            method, bits = key
            with_numba: object = ratios[key, True] if native.compiled() is not None else "not installed"
            time_limit, memory_limit = LIMITS[method]
            how = f"{method} W{bits}A8"
            cells = (with_numba, ratios[key, False], time_limit, kept, plain[key], memory_limit, evaluated[key])
            rows.append([name, how, *cells])
    times = ["step / float", "without numba", "target*"]
    header = ["model", "quantization", *times, "kept / float", "without numba", "target*", "eval"]
    text = f"{conditions()}; medians of {options.rounds} rounds. *ResNet / transformer.\n\n"
    report("torch_steps", PART, text + table(header, rows), write=options.write)


if __name__ == "__main__":
    main()
