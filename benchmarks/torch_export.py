"""What an exported file computes beside the model it is of: codes that differ, float islands, speed and size.

Four networks, six recipes, two targets. `verify` compares every quantized tensor of the ONNX file three ways; speed is
ONNX Runtime's with the file beside ONNX Runtime's with the float model, taking turns. The files for QONNX are written
and checked by their constants alone, because the package that runs them is not in this environment.

Usage: ``python benchmarks/torch_export.py [--rounds N] [--write]``
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import onnxruntime
import torch
from measuring import interleaved, report
from models import TransformerBlock, resnet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone reads
from torch_measuring import PART, arguments

from trainable_torch import calibrate, export, finalize, verify, wrap

RECIPES = {
    "W8A8 SYMMETRIC": ("SYMMETRIC", 8, 8),
    "W8A8 POWER_OF_TWO": ("POWER_OF_TWO", 8, 8),
    "W8A8 UNIFORM": ("UNIFORM", 8, 8),
    "W4A8": ("SYMMETRIC", 4, 8),
    "W4A4": ("SYMMETRIC", 4, 4),
    "W2A4": ("SYMMETRIC", 2, 4),
}
"""Method, bits of weights, bits of activations."""


class Depthwise(nn.Module):
    """Three blocks of a depthwise and a pointwise convolution with batch norms and ReLU6.

    Parameters
    ----------
    width : int
        Channels.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU6(),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (N, 10)."""
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """One step down, one up by a transposed convolution, and a concatenation.

    Parameters
    ----------
    width : int
        Channels.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down, self.mid = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Conv2d(2 * width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image, shape of `x`."""
        across = torch.relu(self.down(x))
        up = torch.relu(self.up(torch.relu(self.mid(F.max_pool2d(across, 2)))))
        return self.out(torch.cat([up, across], 1))


def cases() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield networks with their batches."""
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, make in (("residual", lambda: resnet(64)), ("depthwise", Depthwise), ("U-Net", UNet)):
        torch.manual_seed(1)
        yield name, make().eval(), images
    torch.manual_seed(1)
    rows = torch.randn(4, 64, 256, generator=torch.Generator().manual_seed(0))
    yield "transformer block", TransformerBlock().eval(), rows


def recipe(method: str, weights: int, activations: int, target: str) -> dict[str, Any]:
    """Return a recipe with integers wherever a target can have them."""
    return {
        "target": target,
        "bias": "int32",
        "weights": {"method": method, "n_bits": weights, "training_method": "LSQ", "per_channel": method != "UNIFORM"},
        "activations": {
            "method": method,
            "n_bits": activations,
            "training_method": "LSQ",
            "placement": "integer",
        },
    }


def runner(path: Path, x: Tensor) -> Callable[[], object]:
    """Return a run of a file on a batch, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())}
    return lambda: session.run(None, feeds)


def float_file(model: nn.Module, x: Tensor, path: Path) -> Path:
    """Write the float model as PyTorch does."""
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


def row_of(name: str, width: str, deployed: nn.Module, x: Tensor, folder: Path, rounds: int) -> list[object]:
    """Return a line of the table: what `verify` finds in a file, and its speed and size beside the float one's."""
    path, plain = folder / "model.onnx", folder / f"{name}.onnx"
    written = export(deployed, path, target="onnx", example=x)
    found = verify(deployed, path, [x])
    rows = [each for each in found.rows if each.framework is not None]
    certain = [each for each in rows if each.must_be_equal]
    codes = sum(each.framework.codes for each in rows if each.framework)
    apart = sum(each.framework.different for each in rows if each.framework)
    largest = max((each.framework.largest for each in rows if each.framework), default=0)
    numpy = sum(each.numpy.different for each in found.rows if each.numpy)
    certified = sum(each.framework.different for each in certain if each.framework)
    speed = 1 / interleaved(runner(plain, x), {"": runner(path, x)}, rounds)[""]
    return [
        name,
        width,
        f"{codes:,}",
        numpy,
        f"{apart} (by {largest})" if apart else 0,
        f"{certified} in {len(certain)} of {len(rows)} rows",
        len(found.changed),
        len(written.islands),
        speed,
        path.stat().st_size / plain.stat().st_size,
    ]


def main() -> None:
    """Print the tables."""
    options = arguments(__doc__ or "", rounds=15)
    warnings.simplefilter("ignore")
    header = [
        "network",
        "recipe",
        "codes",
        "NumPy against the runtime: differ",
        "framework against the runtime: differ",
        "of which certified",
        "constants that are not the model's",
        "float islands",
        "times as fast as float",
        "size, of float",
    ]
    rows, qonnx = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, model, x in cases():
            float_file(model, x, folder / f"{name}.onnx")
            for width, (method, weights, activations) in RECIPES.items():
                deployed = finalize(calibrate(wrap(model, recipe(method, weights, activations, "onnx")), [x]))
                rows.append(row_of(name, width, deployed, x, folder, options.rounds))
                print(rows[-1], flush=True)
                deployed = finalize(calibrate(wrap(model, recipe(method, weights, activations, "qonnx")), [x]))
                written = export(deployed, folder / "model.qonnx.onnx", target="qonnx", example=x)
                qonnx.append([name, width, written.weights, written.activations, written.size])
    report(
        "torch_export",
        f"ONNX Runtime {onnxruntime.__version__}, {PART}",
        measuring.table(header, rows),
        write=options.write,
    )
    header = ["network", "recipe", "quantized weights", "quantized activations", "bytes"]
    report("torch_export", f"QONNX, {PART}", measuring.table(header, qonnx), write=options.write)


if __name__ == "__main__":
    main()
