"""The networks and their training in PyTorch; the float models are trained here, for both frameworks."""

from __future__ import annotations

import math
import os
import sys
from collections import OrderedDict
from typing import Any

import floats
import numpy as np
import torch
from cells import FLOAT, Cell, recipe
from problems import CONTEXT, PROBLEMS, VOCABULARY, Array, Data, Problem, batches, load, score
from torch import Tensor, nn

import trainable_torch

Sequential = OrderedDict[str, nn.Module]


def _convolution(name: str, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> Sequential:
    """Return convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    return OrderedDict({f"{name}_conv": convolution, f"{name}_norm": norm, f"{name}_relu": nn.ReLU()})


def _classifier(blocks: list[Sequential], width: int) -> nn.Module:
    layers: Sequential = OrderedDict()
    for block in blocks:
        layers.update(block)
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(width, 10))
    return nn.Sequential(layers)


def cnn() -> nn.Module:
    """Return three convolutions and a linear layer for images of shape (1, 8, 8)."""
    body = [_convolution("body1", 8, 16, stride=2), _convolution("body2", 16, 16, stride=2)]
    return _classifier([_convolution("stem", 1, 8), *body], 16)


def depthwise() -> nn.Module:
    """Return a convolution, three depthwise ones with a pointwise one behind each, and a linear layer."""
    blocks = [_convolution("stem", 1, 16, stride=2)]
    for index, (inputs, outputs) in enumerate([(16, 32), (32, 32), (32, 32)]):
        blocks.append(_convolution(f"depth{index}", inputs, inputs, groups=inputs))
        blocks.append(_convolution(f"point{index}", inputs, outputs, size=1))
    return _classifier(blocks, 32)


class Block(nn.Module):
    """Causal attention and a feed-forward part, each behind a layer norm, with residuals.

    Parameters
    ----------
    width, heads, hidden : int
        Features, attention heads, and features of the feed-forward part.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.project = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, shape (N, length, width)."""
        normed = self.norm1(x)
        parts = (layer(normed) for layer in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks between embeddings and a linear layer, for codes of characters of shape (N, length)."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.block0, self.block1 = Block(width, heads, hidden), Block(width, heads, hidden)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of the next characters, shape (N, length, characters)."""
        x = self.embedding(codes) + self.position(torch.arange(codes.shape[1]))
        return self.head(self.norm(self.block1(self.block0(x))))


class Recurrent(nn.Module):
    """A GRU and a linear layer, for series of shape (N, length, 1)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.recurrent = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what comes later, shape (N, 1)."""
        return self.head(self.recurrent(x)[0][:, -1])


NETWORKS = {"cnn": cnn, "depthwise": depthwise, "transformer": Transformer, "recurrent": Recurrent}


def _tensor(problem: Problem, x: Array) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor.unsqueeze(1) if problem.data == "digits" else tensor


def _loss(problem: Problem, outputs: Tensor, y: Array) -> Tensor:
    targets = torch.from_numpy(y)
    if problem.classifies:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return nn.functional.mse_loss(outputs, targets)


def _train(
    problem: Problem,
    model: nn.Module,
    data: Data,
    groups: Any,
    *,
    rate: float,
    steps: int,
    seed: int,
    decays: bool = True,
) -> None:
    optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    quantized = not isinstance(groups[0], Tensor)
    model.train()
    for x, y in batches(problem, data, steps=steps, seed=seed):
        loss = _loss(problem, model(_tensor(problem, x)), y)
        if quantized:
            loss = loss + trainable_torch.regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if decays:
            cosine.step()
    model.eval()


@torch.no_grad()
def _score(problem: Problem, model: nn.Module, data: Data) -> float:
    return score(problem, model(_tensor(problem, data.test_x)).numpy(), data.test_y)


def train_float(network: str, seed: int) -> None:
    """Train a float model and keep its weights."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    problem, file = PROBLEMS[network], floats.file_of(network, seed)
    model = NETWORKS[network]()
    parameters = list(model.parameters())
    data = load(problem, seed)
    _train(problem, model, data, parameters, rate=problem.float_rate, steps=problem.float_steps, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, **{name: value.numpy() for name, value in model.state_dict().items()})
    unfinished.replace(file)


def run(cell: Cell) -> dict[str, float]:
    """Train a cell's network and return the scores of what is deployed."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    problem, data = cell.problem, load(cell.problem, cell.seed)
    model = NETWORKS[cell.network]()
    kept = floats.weights(cell.network, cell.seed)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in kept.items()})
    model.eval()
    if cell.method == FLOAT:
        return {"score": _score(problem, model, data)}
    some = [_tensor(problem, x) for x, _ in batches(problem, data, steps=8, seed=cell.seed + 100)]
    qmodel = trainable_torch.calibrate(trainable_torch.wrap(model, recipe(cell)), some, progress=False)
    if cell.row.reconstructs:
        trainable_torch.reconstruct(qmodel, some, progress=False)
    if cell.row.trains:
        groups = trainable_torch.parameter_groups(qmodel, qparams={"lr": problem.rate * cell.qparams})
        steps, seed, decays = problem.steps, cell.seed + 1, cell.row.decays
        _train(problem, qmodel, data, groups, rate=problem.rate, steps=steps, seed=seed, decays=decays)
    found = {"score": _score(problem, trainable_torch.finalize(qmodel), data)}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        batched = [_tensor(problem, x) for x, _ in batches(problem, data, steps=50, seed=cell.seed + 200)]
        trainable_torch.reestimate_batch_norm(qmodel, batched)
        found["reestimated"] = _score(problem, trainable_torch.finalize(qmodel), data)
    return found


if __name__ == "__main__":
    train_float(sys.argv[1], int(sys.argv[2]))
