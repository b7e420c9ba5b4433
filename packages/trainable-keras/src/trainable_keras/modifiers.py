"""What the built-in modifiers do with Keras's tensors; see core's `reference.oscillation` and `reference.gradual`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainable_core import modifier
from trainable_core.reference.gradual import ELEMENT, STEP
from trainable_core.reference.oscillation import OSCILLATING
from trainable_core.schedule import AnnealingScheduler
from trainable_keras.functions import Tensor

CODE, DIRECTION, FREQUENCY = "oscillation_code", "oscillation_direction", "oscillation_frequency"
AVERAGE, FROZEN = "oscillation_average", "oscillation_frozen"
"""Names of the state that is kept in the quantizer of a weight."""


def codes(quantizer: Any, x: Tensor) -> Tensor:
    """Return the codes of a weight, counted from the code of zero, as float32."""
    f = quantizer.functions
    return f.round(quantizer.quantized(x, training=False) / quantizer.grid(f.rank(x)).scale)


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
    f = quantizer.functions
    before, direction = quantizer.state(CODE), quantizer.state(DIRECTION)
    change = f.where(f.isnan(before), f.zeros_like(now), now - before)
    sign = f.cast(change > 0, "float32") - f.cast(change < 0, "float32")
    turned = f.cast(f.all_of(sign != 0, sign == -direction), "float32")
    quantizer.set_state(FREQUENCY, momentum * turned + (1 - momentum) * quantizer.state(FREQUENCY))
    quantizer.set_state(DIRECTION, f.where(sign != 0, sign, direction))
    quantizer.set_state(CODE, now)


def _share(quantizer: Any, name: str, condition: Any) -> float:
    values = condition(quantizer.to_numpy(getattr(quantizer, name)))
    return float(values.mean()) if values.size else 0.0


def _oscillating(quantizer: Any) -> float:
    return _share(quantizer, FREQUENCY, lambda frequency: frequency > OSCILLATING)


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
        if not quantizer.calibrated or not quantizer.quantization_config.enabled:
            return None
        f = quantizer.functions
        grid = quantizer.grid(f.rank(x))
        values = f.stop_gradient(quantizer.modified_values(x, training=False))
        low = f.stop_gradient((grid.quant_min - grid.zero_point) * grid.scale)
        high = f.stop_gradient((grid.quant_max - grid.zero_point) * grid.scale)
        distance = f.minimum(f.maximum(x, low), high) - values
        return quantizer.annealed(self.strength) * f.sum(distance * distance)

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the share of weights that oscillate."""
        return {"oscillating": _oscillating(quantizer)}


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
        f, m = quantizer.functions, self.momentum
        frozen, first = quantizer.state(FROZEN), f.isnan(quantizer.state(CODE))
        now = f.where(f.isnan(frozen), codes(quantizer, x), frozen)
        average = f.where(first, now, m * now + (1 - m) * quantizer.state(AVERAGE))
        _count(quantizer, now, m)
        quantizer.set_state(AVERAGE, average)
        freezes = f.all_of(quantizer.state(FREQUENCY) > quantizer.annealed(self.threshold), f.isnan(frozen))
        if isinstance(self.threshold, AnnealingScheduler):
            started = f.cast(quantizer.current_step, "float32") >= float(self.threshold.t_start)
            freezes = f.all_of(freezes, started)
        quantizer.set_state(FROZEN, f.where(freezes, f.round(average), frozen))

    def enter(self, quantizer: Any, x: Tensor, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return the weight with the centres of their codes in the place of frozen elements."""
        f = quantizer.functions
        frozen, scale = quantizer.state(FROZEN), f.stop_gradient(quantizer.grid(f.rank(x)).scale)
        return f.where(f.isnan(frozen), x, frozen * scale)

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the shares of weights that oscillate and that are frozen."""
        frozen = _share(quantizer, FROZEN, lambda code: ~np.isnan(code))
        return {"oscillating": _oscillating(quantizer), "frozen": frozen}


class GradualQuantization(modifier.GradualQuantization):
    """Quantizes a growing share of the values; see `trainable_core.reference.gradual`."""

    def leave(self, quantizer: Any, x: Tensor, quantized: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the values of which a share is float in training."""
        if not training:
            return quantized
        f = quantizer.functions
        share = f.cast(quantizer.annealed(self.share), "float32")
        z = f.positions(x) * ELEMENT + quantizer.current_step * STEP
        z = z * (2 * z + 1)
        z = z + z // 65536
        z = z * (2 * z + 1)
        draws = f.cast(z, "float32") * 2.0**-32 + 0.5
        return f.where(f.any_of(draws < share, share >= 1), x, quantized)

    def report(self, quantizer: Any) -> dict[str, float]:
        """Return the share of values that are float in training."""
        share = self.share
        if isinstance(share, AnnealingScheduler):
            share = share(max(quantizer.counted_steps - 1, 0))
        return {"float": float(share)}


BUILTIN = (OscillationDampening, OscillationFreezing, GradualQuantization)
"""What both plugins register."""
