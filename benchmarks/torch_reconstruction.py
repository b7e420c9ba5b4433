"""Weights whose roundings `reconstruct` learns, against the nearest codes: the error of each layer, and the accuracy.

Networks are trained on digits in float; weights alone are quantized, per channel, and 256 training images are all that
`reconstruct` sees. An error is the squared distance of a layer's outputs from the float model's, on those images.

Usage: ``python benchmarks/torch_reconstruction.py [--rounds SEEDS] [--write]``
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import small_networks
import torch
from measuring import report, table
from torch import nn
from torch_measuring import PART, arguments, conditions

import trainable_torch

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "depthwise": small_networks.depthwise,
    "transformer": small_networks.Transformer,
}
WIDTHS = (4, 3, 2)
EPOCHS, IMAGES = 30, 256


class Found(NamedTuple):
    """What was measured of one network, seed and number of bits.

    Parameters
    ----------
    network : str
        Its name.
    seed, n_bits : int
        Of the training, and of the weights.
    accuracies : tuple of float
        Of the float model, with the nearest codes and with learned ones.
    ratios : dict
        By layer, the error with learned codes as a share of that with the nearest ones.
    """

    network: str
    seed: int
    n_bits: int
    accuracies: tuple[float, float, float]
    ratios: dict[str, float]


def measured(seeds: Iterable[int]) -> list[Found]:
    """Return the figures of all networks for some seeds."""
    return [each for seed in seeds for name in NETWORKS for each in _of_network(name, seed)]


def _of_network(name: str, seed: int) -> list[Found]:
    data = small_networks.digits.load(seed)
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    small_networks.train(model, data, EPOCHS, seed, torch.optim.Adam(model.parameters(), 3e-3))
    images, _ = small_networks.tensors(data.train_x[:IMAGES], data.train_y[:IMAGES])
    batches = list(images.split(64))
    found = []
    for n_bits in WIDTHS:
        recipe: dict[str, Any] = {
            "weights": {"method": "SYMMETRIC", "n_bits": n_bits, "training_method": "ADAROUND"},
            "calibration": {"weights": "mse"},
        }
        qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe), batches, progress=False)
        nearest = small_networks.accuracy(qmodel, data)
        rows = trainable_torch.reconstruct(qmodel, batches, progress=False).rows
        learned = small_networks.accuracy(trainable_torch.finalize(qmodel), data)
        ratios = {row.layer: row.learned / row.nearest for row in rows}
        found.append(Found(name, seed, n_bits, (small_networks.accuracy(model, data), nearest, learned), ratios))
    return found


def summary(found: Iterable[Found]) -> str:
    """Return the accuracies, and the errors of layers, as tables."""
    groups: dict[tuple[str, int], list[Found]] = {}
    for each in found:
        groups.setdefault((each.network, each.n_bits), []).append(each)
    accuracies: list[list[object]] = []
    errors: dict[tuple[str, str], list[object]] = {}
    for (network, n_bits), those in groups.items():
        accuracies.append([network, n_bits, *map(_spread, zip(*(each.accuracies for each in those), strict=True))])
        for layer in those[0].ratios:
            errors.setdefault((network, layer), []).append(statistics.mean(each.ratios[layer] for each in those))
    heads = table(["network", "bits", "float", "nearest", "learned"], accuracies)
    rows = [[*key, *values] for key, values in errors.items()]
    return f"{heads}\n\n{table(['network', 'layer', *(f'{n_bits} bits' for n_bits in WIDTHS)], rows)}"


def _spread(values: Iterable[float]) -> str:
    those = [100 * value for value in values]
    spread = f" ± {statistics.stdev(those):.1f}" if len(those) > 1 else ""
    return f"{statistics.mean(those):.1f}{spread}"


def main() -> None:
    """Measure both networks."""
    options = arguments(__doc__, 3)
    report(
        "torch_reconstruction",
        PART,
        f"{conditions()}\n\n{summary(measured(range(options.rounds)))}",
        write=options.write,
    )


if __name__ == "__main__":
    main()
