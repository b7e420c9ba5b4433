"""What a step of a small linear layer costs in PyTorch, where calls and not arithmetic take the time.

Microseconds for each of ten layers of 32 by 32: forward and backward in training, and the forward alone in evaluation
of the trainable and of the finalized model. The models take turns, and the least time counts: on a shared machine, it
is the one that depends least on what others do.

Usage: ``python benchmarks/torch_small_layers.py [--rounds N]``
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measuring import table
from torch import nn
from torch_measuring import arguments

import trainable_torch

LAYERS, FEATURES = 10, 32
METHODS = ("STE", "LSQ")
BATCHES = (1, 16)


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a training step without the optimizer's part."""
    return lambda: model(x).sum().backward()


def forward(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def least(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least time of each run, in microseconds for a layer; they take turns."""
    found = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - started)
    return {name: seconds * 1e6 / LAYERS for name, seconds in found.items()}


def main() -> None:
    """Print the table."""
    options = arguments(__doc__ or "", rounds=600)
    torch.manual_seed(0)
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, FEATURES)
        layers = nn.Sequential(*[nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)])
        models = {"float": layers}
        for method in METHODS:
            spec = {"method": "SYMMETRIC", "n_bits": 8, "training_method": method}
            for name, recipe in (("", {"weights": spec, "activations": spec}), (", weights", {"weights": spec})):
                models[f"{method}{name}"] = trainable_torch.calibrate(trainable_torch.wrap(layers, recipe), [x])
        finalized = {name: trainable_torch.finalize(model) for name, model in models.items() if name != "float"}
        training = least({name: step(model.train(), x) for name, model in models.items()}, options.rounds)
        evaluated = least({name: forward(model.eval(), x) for name, model in models.items()}, options.rounds)
        deployed = least({name: forward(model.eval(), x) for name, model in finalized.items()}, options.rounds)
        rows += [
            [name, batch, *(f"{times[name]:.1f}" if name in times else "" for times in (training, evaluated, deployed))]
            for name in models
        ]
    print(table(["quantized by", "batch", "training step, us", "evaluation, us", "finalized, us"], rows))


if __name__ == "__main__":
    main()
