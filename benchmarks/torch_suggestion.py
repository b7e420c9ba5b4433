"""Widths that `suggest` chooses against one width for all, at the same average number of bits per weight.

A network is trained in float, wrapped with 8-bit weights and activations, and `suggest` is asked for an average of 3 or
4 bits. The float network is then wrapped with its recipe, and with one that gives 3 or 4 bits to every weight; both
are calibrated, and trained for the same number of epochs with the same batches. Figures are of the test images:
divergence from the float network in nats before the training (calibrated alone), and accuracy before and after it.

Usage: ``python benchmarks/torch_suggestion.py [--rounds SEEDS] [--write]``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import small_networks
import torch
from measuring import report, table
from torch import nn
from torch_measuring import PART, arguments, conditions

import trainable_torch

RECIPE: dict[str, Any] = {
    "weights": {"method": "SYMMETRIC", "n_bits": 8, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "LSQ"},
}
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "depthwise": small_networks.depthwise,
    "transformer": small_networks.Transformer,
}
BUDGETS = (3, 4)
FLOAT_EPOCHS, EPOCHS = 30, 10

Row = tuple[str, int, int, str, float, float, float, float]
"""Network, seed, budget, widths; bits on average, divergence, accuracy before and after training."""


def measured(names: Iterable[str], seeds: Iterable[int]) -> list[Row]:
    """Return the figures of networks for some seeds."""
    rows: list[Row] = []
    for name in names:
        for seed in seeds:
            rows += _of_network(name, seed)
    return rows


def _of_network(name: str, seed: int) -> list[Row]:
    data = small_networks.digits.load(seed)
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    small_networks.train(model, data, FLOAT_EPOCHS, seed, torch.optim.Adam(model.parameters(), 3e-3))
    rows: list[Row] = [(name, seed, 32, "float", 32.0, 0.0, *([small_networks.accuracy(model, data)] * 2))]
    images, _ = small_networks.tensors(data.train_x[:512], data.train_y[:512])
    batches = list(images.split(64))
    wide = trainable_torch.calibrate(trainable_torch.wrap(model, RECIPE), batches, progress=False)
    for budget in BUDGETS:
        suggestion = trainable_torch.suggest(wide, batches, budget, progress=False)
        same = {**RECIPE, "weights": {**RECIPE["weights"], "n_bits": budget}}
        for widths, recipe, bits in (
            ("one", same, float(budget)),
            ("suggested", suggestion.recipe, suggestion.average_bits),
        ):
            qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe), batches, progress=False)
            apart = _divergence(model, qmodel, data)
            before = small_networks.accuracy(qmodel, data)
            groups = trainable_torch.parameter_groups(qmodel, qparams={"lr": 1e-4})
            small_networks.train(qmodel, data, EPOCHS, seed + 100, torch.optim.Adam(groups, 1e-3))
            rows.append((name, seed, budget, widths, bits, apart, before, small_networks.accuracy(qmodel, data)))
    return rows


@torch.no_grad()
def _divergence(model: nn.Module, qmodel: nn.Module, data: Any) -> float:
    x, _ = small_networks.tensors(data.test_x, data.test_y)
    p, q = (each.eval()(x).log_softmax(1) for each in (model, qmodel))
    return float((p.exp() * (p - q)).sum(1).mean())


def summary(rows: Iterable[Row]) -> str:
    """Return the means over the seeds as a table, and in how many seeds the suggested widths are better."""
    found = list(rows)
    lines: list[list[object]] = []
    for name in dict.fromkeys(row[0] for row in found):
        for budget in sorted({row[2] for row in found}, reverse=True):
            of = {
                widths: [row for row in found if (row[0], row[2], row[3]) == (name, budget, widths)]
                for widths in ("float", "one", "suggested")
            }
            for widths, those in of.items():
                if not those:
                    continue
                apart, before, after = (statistics.mean(row[index] for row in those) for index in (5, 6, 7))
                better = ""
                if widths == "suggested":
                    wins = [
                        sum(sign * (one[index] - other[index]) > 0 for one, other in zip(those, of["one"], strict=True))
                        for index, sign in ((5, -1), (6, 1), (7, 1))
                    ]
                    better = "{} / {} / {} of {}".format(*wins, len(those))
                bits = statistics.mean(row[4] for row in those)
                lines.append([name, widths, bits, f"{apart:.4f}", f"{before:.1%}", f"{after:.1%}", better])
    header = ["network", "widths", "bits", "divergence", "accuracy, calibrated", "accuracy, trained", "better in seeds"]
    return table(header, lines)


def main() -> None:
    """Measure both networks."""
    options = arguments(__doc__, 5)
    rows = measured(NETWORKS, range(options.rounds))
    report("torch_suggestion", PART, f"{conditions()}\n\n{summary(rows)}", write=options.write)


if __name__ == "__main__":
    main()
