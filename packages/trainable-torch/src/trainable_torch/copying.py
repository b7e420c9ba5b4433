"""Copies of models."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """Return a deep copy of a model, also where a hook left a tensor of the autograd graph in it.

    ``weight_norm``, ``spectral_norm`` and pruning put a computed weight into the layer at each forward, which
    `copy.deepcopy` refuses. The copy has its values, and computes it anew at its own next forward.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
