"""From a float model to a deployed 4-bit one in PyTorch, on real digits, in a minute.

Trains a small convolutional network in float, wraps it with a recipe, calibrates it, trains it quantized, finalizes it,
and shows that the deployed model gives bit for bit what was trained. Then it writes ``quickstart.onnx``, and shows that
ONNX Runtime computes the same integers in every layer.

    python examples/quickstart_torch.py [--recipe FILE] [--epochs N] [--seed S] [--out FILE]
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import digits
import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import trainable_torch
from trainable_core import QuantizationRecipe

FILE = "quickstart.onnx"


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def network() -> nn.Sequential:
    """Return the float model."""
    return nn.Sequential(
        OrderedDict(
            stem=block(1, 16),
            body1=block(16, 32, stride=2),
            body2=block(32, 32),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(32, 10),
        )
    )


def tensors(images: digits.Images, labels: digits.Labels) -> tuple[Tensor, Tensor]:
    """Return images, with an axis for their one channel, and labels as PyTorch's."""
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)


def train(
    model: nn.Module, data: Iterator[tuple[digits.Images, digits.Labels]], steps: int, optimizer: torch.optim.Optimizer
) -> None:
    """Train with a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for batch in tqdm(data, total=steps, disable=None, leave=False):
        x, y = tensors(*batch)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that a model gets right."""
    return float((model(x).argmax(1) == y).float().mean())


def for_integers(path: Path) -> QuantizationRecipe:
    """Return a recipe for a model that is to run in integers: quantizers wherever a tensor is stored, int32 biases."""
    recipe = QuantizationRecipe.of(path).model_dump(mode="json")
    activations = {**recipe["activations"], "placement": "integer"}
    return QuantizationRecipe.of({**recipe, "activations": activations, "bias": "int32", "target": "onnx"})


def milliseconds(model: bytes | str, x: Tensor) -> float:
    """Return how long ONNX Runtime takes for some images, on one thread; the fastest of many runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    times = []
    for _ in range(30):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - started)
    return 1000 * float(np.min(times))


def in_float(model: nn.Module, x: Tensor) -> bytes:
    """Return the float model as an ONNX file, to compare its speed with."""
    rows = {0: torch.export.Dim.AUTO}
    logging.disable(logging.WARNING)  # the exporter's own, as the warnings are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model.eval(), (x[:2],), dynamo=True, dynamic_shapes=(rows,), verbose=False)
    return program.model_proto.SerializeToString()


def ship(model: nn.Module, deployed: nn.Module, x: Tensor) -> dict[str, float]:
    """Write the deployed model for ONNX Runtime, verify it on all images, and return the figures."""
    print(trainable_torch.export(deployed, FILE, example=x[:2]))
    found = trainable_torch.verify(deployed, FILE, [x])
    print(found, end="\n\n")
    different = sum(row.framework.different for row in found.rows if row.framework is not None)
    integers, floats = milliseconds(FILE, x), milliseconds(in_float(model, x), x)
    print(f"{len(x)} images in ONNX Runtime: {integers:.2f} ms in integers, {floats:.2f} ms in float\n")
    return {"codes_different": different, "verified": int(found.ok), "ms_in_integers": integers, "ms_in_float": floats}


def main() -> None:
    """Run the steps and report."""
    options = digits.options(__doc__, "quickstart_torch.json", "w4a8_pot_lsq.yaml")
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    data = digits.load(options.seed)
    steps = digits.batches_per_epoch(data.train_x)
    train_x, _ = tensors(data.train_x, data.train_y)
    test_x, test_y = tensors(data.test_x, data.test_y)

    model = network()
    batches = digits.batches(data.train_x, data.train_y, epochs=digits.FLOAT_EPOCHS, seed=options.seed)
    train(model, batches, digits.FLOAT_EPOCHS * steps, torch.optim.Adam(model.parameters(), lr=5e-3))

    qmodel = trainable_torch.wrap(model, for_integers(options.recipe))
    trainable_torch.calibrate(qmodel, train_x.split(256))
    calibrated_accuracy = accuracy(qmodel.eval(), test_x, test_y)
    batches = digits.batches(data.train_x, data.train_y, epochs=options.epochs, seed=options.seed + 1)
    train(qmodel, batches, options.epochs * steps, torch.optim.Adam(trainable_torch.parameter_groups(qmodel), lr=1e-3))
    deployed = trainable_torch.finalize(qmodel)

    with torch.no_grad():
        difference = float((deployed(test_x) - qmodel(test_x)).abs().max())
    figures = {
        "float_accuracy": accuracy(model, test_x, test_y),
        "calibrated_accuracy": calibrated_accuracy,
        "trained_accuracy": accuracy(qmodel, test_x, test_y),
        "deployed_accuracy": accuracy(deployed, test_x, test_y),
        "max_abs_difference": difference,
        **ship(model, deployed, test_x),
        "seed": options.seed,
    }
    digits.report(figures, trainable_torch.describe(deployed), options.out, time.perf_counter() - started)


if __name__ == "__main__":
    main()
