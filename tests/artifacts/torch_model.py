"""The artifacts' float model in PyTorch."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn

from tests.artifacts.model import CONV, HEAD, IMAGES


def network(*, filled: bool = True) -> nn.Sequential:
    """Return the float model; without its numbers if they are to come from a file."""
    conv, head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(64, 5, bias=False)
    with torch.no_grad():
        for layer, weight in ((conv, CONV), (head, HEAD)):
            layer.weight.copy_(torch.from_numpy(weight if filled else np.ones_like(weight)))
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), flatten=nn.Flatten(), head=head))


def images() -> Tensor:
    """Return what the model is run on."""
    return torch.from_numpy(IMAGES)
