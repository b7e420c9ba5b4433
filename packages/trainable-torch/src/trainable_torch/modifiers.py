"""What the built-in modifiers do with PyTorch's tensors; see core's `reference.oscillation` and `reference.gradual`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainable_core import modifier
from trainable_core.reference.gradual import ELEMENT, STEP
from trainable_core.reference.oscillation import OSCILLATING
from trainable_core.schedule import AnnealingScheduler

CODE, DIRECTION, FREQUENCY = "oscillation_code", "oscillation_direction", "oscillation_frequency"
AVERAGE, FROZEN = "oscillation_average", "oscillation_frozen"
"""Names of the state that is kept in the quantizer of a weight."""


def codes(quantizer: Any, x: Tensor) -> Tensor:
    """Return the codes of a weight, counted from the code of zero, as float32."""
    found: Tensor = (quantizer.quantize(x, training=False) / quantizer.grid(x.dim()).scale).round()
    return found


_COUNTER = {CODE: math.nan, DIRECTION: 0.0, FREQUENCY: 0.0}
_FREEZER = {**_COUNTER, AVERAGE: 0.0, FROZEN: math.nan}
"""First values of the state of either modifier."""


def _add(quantizer: Any, state: Mapping[str, float]) -> None:
    for name, value in state.items():
        quantizer.add_state(name, np.full(quantizer.values_shape, value, np.float32))


def _start_anew(quantizer: Any, state: Mapping[str, float]) -> None:
    for name, value in state.items():
        quantizer.assign(getattr(quantizer, name), np.full(quantizer.values_shape, value, np.float32))


def _count(quantizer: Any, now: Tensor, momentum: float) -> None:
    """Count the oscillations of a weight with these codes."""
    before, direction = getattr(quantizer, CODE), getattr(quantizer, DIRECTION)
    change = torch.where(before.isnan(), 0.0, now - before)
    turned = (change != 0) & (change.sign() == -direction)
    quantizer.set_state(FREQUENCY, momentum * turned + (1 - momentum) * getattr(quantizer, FREQUENCY))
    quantizer.set_state(DIRECTION, torch.where(change != 0, change.sign(), direction))
    quantizer.set_state(CODE, now)


def _share(of: Tensor) -> float:
    return float(of.float().mean()) if of.numel() else 0.0


class OscillationDampening(modifier.OscillationDampening):
    """Draws weights to the centres of their codes; see `trainable_core.reference.oscillation.dampening`."""

    def add_state(self, quantizer: Any) -> None:
        """Create what counts oscillations, unless freezing counts them already."""
        if not any(isinstance(each, OscillationFreezing) for each in quantizer.modifiers):
            _add(quantizer, _COUNTER)

    def start_anew(self, quantizer: Any) -> None:
        """Forget what was counted, unless freezing does."""
        if not hasattr(quantizer, FROZEN):
            _start_anew(quantizer, _COUNTER)

    def observe(self, quantizer: Any, x: Tensor) -> None:
        """Count the oscillations of a weight, unless freezing does."""
        if not hasattr(quantizer, FROZEN):
            _count(quantizer, codes(quantizer, x), self.momentum)

    def term(self, quantizer: Any, x: Tensor) -> Tensor | None:
        """Return the strength times the squared distance of the clipped weight from its quantized value."""
        if not quantizer.calibrated or quantizer.is_switched_off:
            return None
        with torch.no_grad():
            grid = quantizer.grid(x.dim())
            values = quantizer.modified_values(x, training=False)
            low = (grid.quant_min - grid.zero_point) * grid.scale
            high = (grid.quant_max - grid.zero_point) * grid.scale
        strength = quantizer.annealed(self.strength)
        distance = (torch.minimum(torch.maximum(x, low), high) - values).square().sum()
        term: Tensor = distance * (strength.to(x.dtype) if isinstance(strength, Tensor) else strength)
        return term

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the share of weights that oscillate."""
        return {"oscillating": _share(getattr(quantizer, FREQUENCY) > OSCILLATING)}


class OscillationFreezing(modifier.OscillationFreezing):
    """Freezes the codes of weights that oscillate; see `trainable_core.reference.oscillation`."""

    def add_state(self, quantizer: Any) -> None:
        """Create what counts oscillations, the average codes and the frozen ones."""
        _add(quantizer, _FREEZER)

    def start_anew(self, quantizer: Any) -> None:
        """Forget what was counted and frozen: codes of another grid mean other values."""
        _start_anew(quantizer, _FREEZER)

    def observe(self, quantizer: Any, x: Tensor) -> None:
        """Count the oscillations of a weight, and freeze what oscillates too often."""
        frozen, first, m = getattr(quantizer, FROZEN), getattr(quantizer, CODE).isnan(), self.momentum
        now = torch.where(frozen.isnan(), codes(quantizer, x), frozen)
        average = torch.where(first, now, m * now + (1 - m) * getattr(quantizer, AVERAGE))
        _count(quantizer, now, m)
        quantizer.set_state(AVERAGE, average)
        threshold = quantizer.annealed(self.threshold)
        freezes = (getattr(quantizer, FREQUENCY) > threshold) & frozen.isnan()
        if isinstance(self.threshold, AnnealingScheduler):
            freezes = freezes & (quantizer.current_step >= self.threshold.t_start)
        quantizer.set_state(FROZEN, torch.where(freezes, average.round(), frozen))

    def enter(self, quantizer: Any, x: Tensor, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return the weight with the centres of their codes in the place of frozen elements."""
        frozen = getattr(quantizer, FROZEN)
        return torch.where(frozen.isnan(), x, frozen * quantizer.grid(x.dim()).scale.detach())

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the shares of weights that oscillate and that are frozen."""
        frozen = ~getattr(quantizer, FROZEN).isnan()
        return {"oscillating": _share(getattr(quantizer, FREQUENCY) > OSCILLATING), "frozen": _share(frozen)}


class GradualQuantization(modifier.GradualQuantization):
    """Quantizes a growing share of the values; see `trainable_core.reference.gradual`."""

    def leave(self, quantizer: Any, x: Tensor, quantized: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the values of which a share is float in training."""
        if not training:
            return quantized
        share = torch.as_tensor(quantizer.annealed(self.share), device=x.device).to(torch.float32)
        z = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
        z = z * ELEMENT + quantizer.current_step.to(torch.int32) * STEP
        z = z * (2 * z + 1)
        z = z + (z >> 16)
        z = z * (2 * z + 1)
        draws = z.to(torch.float32) * 2.0**-32 + 0.5
        return torch.where((draws < share) | (share >= 1), x, quantized)

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the share of values that are float in training."""
        return {"float": float(quantizer.annealed(self.share))}


BUILTIN = (OscillationDampening, OscillationFreezing, GradualQuantization)
"""What the plugin registers."""
