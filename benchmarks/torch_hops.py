"""How long the way through this project's Python is: calls, functions and files of one quantized convolution.

Counted is every frame of Python code in the files of ``trainable_torch`` and ``trainable_core`` that one call enters,
so functions, methods, properties, lambdas and comprehensions; not PyTorch's own, and nothing that is cached in C.
Forward and backward are of a training step, the last row is the forward of the finalized model. Each is counted on its
third run, when what is made once has been made.

Usage: ``python benchmarks/torch_hops.py [--calls]``. To count another checkout's code, put the ``src`` folders of its
``trainable-torch`` and ``trainable-core`` first in ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import trainable_torch

Place = tuple[str, str, int]

WAYS = {"STE weights, LSQ input": ("STE", "LSQ"), "LSQ weights, LSQ input": ("LSQ", "LSQ")}


def hops(run: Callable[[], object]) -> Counter[Place]:
    """Return how often each function of this project is called in a run, by file, name and line."""
    found: Counter[Place] = Counter()

    def seen(frame: FrameType, event: str, _argument: object) -> None:
        parts = Path(frame.f_code.co_filename).parts
        for package in ("trainable_torch", "trainable_core"):
            if event == "call" and package in parts:
                file = "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
                found[file, frame.f_code.co_qualname, frame.f_code.co_firstlineno] += 1

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def convolution(weights: str, inputs: str) -> nn.Module:
    """Return a wrapped and calibrated convolution: 4-bit weights per channel, an 8-bit input."""
    method = "SYMMETRIC"
    recipe = {
        "weights": {"method": method, "training_method": weights, "n_bits": 4, "per_channel": True},
        "activations": {"method": method, "training_method": inputs, "n_bits": 8},
        "fold_batch_norm": False,
    }
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    return trainable_torch.calibrate(trainable_torch.wrap(model, recipe), [torch.randn(4, 16, 16, 16)])


def counted(weights: str, inputs: str) -> dict[str, Counter[Place]]:
    """Return the hops of a training forward, its backward, and the finalized forward."""
    qmodel = convolution(weights, inputs).train()
    layer, x = qmodel[0], torch.randn(4, 16, 16, 16, requires_grad=True)
    found = {}
    for _ in range(3):
        outputs = []
        found["training forward"] = hops(lambda: outputs.append(layer(x)))  # noqa: B023 - called at once
        loss = outputs[0].square().mean()
        found["backward"] = hops(loss.backward)
    deployed = trainable_torch.finalize(qmodel)[0]
    with torch.no_grad():
        for _ in range(3):
            found["finalized forward"] = hops(lambda: deployed(x))
    return found


def main() -> None:
    """Print a table; with ``--calls`` every function as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", action="store_true", help="list every function that is called, and how often")
    options, _ = parser.parse_known_args()  # `nox -s bench` gives every script the same options
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{Path(trainable_torch.__file__).parent}\n")
    print("| convolution | | calls | functions | files |\n|---|---|---|---|---|")
    lists = []
    for name, methods in WAYS.items():
        for what, found in counted(*methods).items():
            files = {file for file, _, _ in found}
            print(f"| {name} | {what} | {found.total()} | {len(found)} | {len(files)} |")
            lists.append((f"{name}: {what}", found))
    if options.calls:
        for title, found in lists:
            print(f"\n{title}")
            for (file, function, line), count in sorted(found.items()):
                print(f"  {count:3d}  {file}:{line} {function}")


if __name__ == "__main__":
    main()
