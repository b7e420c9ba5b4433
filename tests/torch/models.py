"""What the model-level PyTorch tests share: recipes, small models, a few training steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import trainable_torch
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.training import quantizers_of

TRAINED_BY = ("STE", "LSQ", "DQA")
GRIDS = ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")


def spec(training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    """Return how one kind of tensor is quantized, as a recipe says it."""
    return {"training_method": training_method, "method": method, "n_bits": n_bits, **more}


def recipe(training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any) -> dict[str, Any]:
    """Return a recipe that quantizes weights and activations alike; `more` replaces or adds parts."""
    both = spec(training_method, method, n_bits)
    return {"weights": both, "activations": dict(both), **more}


def weights_only(
    training_method: str = "STE", method: str = "SYMMETRIC", n_bits: int = 4, **more: Any
) -> dict[str, Any]:
    """Return a recipe for weights, the rest float."""
    return {"weights": spec(training_method, method, n_bits), **more}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return convolutions and a linear layer, with batch norm and activations, for images of shape (1, 6, 6)."""
    torch.manual_seed(0)
    layers = OrderedDict(
        stem=nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3, bias=False), norm=nn.BatchNorm2d(4), relu=nn.ReLU())),
        body=nn.Conv2d(4, 4, 3, groups=4),
        relu=nn.ReLU(),
        flatten=nn.Flatten(),
        head=nn.Linear(16, 3),
    )
    return nn.Sequential(layers).to(dtype)


def images(count: int = 8) -> Tensor:
    """Return inputs of `network`, the same for the same count."""
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(count))


def vectors(*shape: int) -> Tensor:
    """Return normal numbers of this shape, always the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ready(model: nn.Module, how: Any, *batches: Any) -> nn.Module:
    """Return the model wrapped and calibrated."""
    return trainable_torch.calibrate(trainable_torch.wrap(model, how), batches)


def train(qmodel: nn.Module, batches: Iterable[Any], lr: float = 0.05) -> nn.Module:
    """Take one step of gradient descent for each batch; return the model, in train mode."""
    optimizer = torch.optim.SGD(trainable_torch.parameter_groups(qmodel), lr=lr)
    qmodel.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = qmodel(batch).square().mean() + trainable_torch.regularization(qmodel)
        loss.backward()
        optimizer.step()
    return qmodel


def moved(qmodel: nn.Module) -> nn.Module:
    """Return the model with every trained number off its calibrated place, as after a long training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
        for quantizer in quantizers_of(qmodel).values():
            if "logits" in quantizer.variable_names:
                quantizer.logits.copy_(torch.randn(quantizer.logits.shape, generator=generator))
    return qmodel


def quantizer_at(qmodel: nn.Module, name: str) -> BasePytorchTrainableQuantizer:
    """Return the trainable quantizer of a module name."""
    return quantizers_of(qmodel)[name]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models hold the same tensors under the same names, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def quantized(
    module: nn.Module, x: Tensor, rule: str, method: str = "SYMMETRIC", *, per_channel: bool = True, **parts: Any
) -> nn.Module:
    """Return a module wrapped and calibrated on one batch, in training: 4 bits, thresholds that clip something."""
    one = spec(rule, method)
    how = {
        "weights": {**one, "per_channel": per_channel},
        "activations": one,
        "calibration": {"weights": "mse", "activations": "percentile"},
        "fold_batch_norm": False,
        **parts,
    }
    return trainable_torch.calibrate(trainable_torch.wrap(module, how), [x]).train()


def bytes_kept(model: nn.Module, x: Tensor) -> int:
    """Return what a forward allocated and did not free: its output, and what is kept for backward."""
    model(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        y = model(x)
    assert y.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def assert_the_graph_can_be_used_twice(model: nn.Module, x: Tensor) -> None:
    """Assert that a retained graph gives the same gradient again, and one that is not refuses."""
    leaf = x.requires_grad_()
    loss = model(leaf).square().sum()
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
