"""Adaptive rounding; defined by `trainable_core.reference.adaround`."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.options import AdaroundOptions
from trainable_core.reference import adaround
from trainable_core.reference.adaround import GAMMA, ZETA
from trainable_keras.functions import Tensor
from trainable_keras.quantizers.base import KerasQuantizer


class AdaroundQuantizer(AdaroundOptions, KerasQuantizer):
    """Whether each weight is rounded up or down learns; see `trainable_core.reference.adaround`.

    Its arguments are those of `trainable_core.backend.options.AdaroundOptions`.

    Notes
    -----
    Weights and grid get no gradient. When a model is finalized, the rounded weights take the place of the float ones.
    """

    declaration = adaround.METHOD

    rounding: Any

    def roundings(self, steps: Tensor) -> Tensor:
        """Return how far each weight is rounded up, from its quotient by the scale."""
        f = self.functions
        fraction = f.where(f.isfinite(steps), steps - f.floor(steps), f.zeros_like(steps))
        start = -f.log((ZETA - GAMMA) / (fraction - GAMMA) - 1.0)
        sigmoid = 1.0 / (1.0 + f.exp(-(self._value_of(self.rounding) + start)))
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = f.minimum(f.maximum(stretched, f.number(0.0)), f.number(1.0))
        return f.where(fraction > 0, h, f.zeros_like(h))

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - the base's signature
        """Return the soft values, or the rounded ones."""
        f = self.functions
        grid = self.grid(f.rank(x))
        scale = f.stop_gradient(grid.scale)
        steps = f.stop_gradient(x) / scale
        h = self.roundings(steps)
        up = f.stop_gradient(f.cast(h >= 0.5, "float32"))  # noqa: PLR2004 - half
        hard = f.stop_gradient(self.ops.ste_fake_quantize((f.floor(steps) + up) * scale, grid))
        hard = f.where(f.isnan(x), x, hard)  # in the graph, as every quantizer's output; with a gradient of zero
        if not training:
            return f.show_shape(hard, x)
        low, high = (end - f.stop_gradient(grid.zero_point) for end in (grid.quant_min, grid.quant_max))
        soft = f.minimum(f.maximum(f.floor(steps) + h, low), high) * scale
        return self.until(
            adaround.schedule_end(self.beta), f.show_shape(f.where(f.isnan(x), x, soft), x), f.show_shape(hard, x)
        )

    def regularization_of(self, x: Tensor) -> Tensor | None:
        """Return the regularizer, while its schedule lasts."""
        other = super().regularization_of(x)
        x = self.laid_out(x)
        if not self.regularization_weight or not self.calibrated or not self.quantization_config.enabled:
            return other
        f = self.functions
        h = self.roundings(f.stop_gradient(x / self.grid(f.rank(x)).scale))
        beta, step = self.annealed(self.beta), f.cast(self.current_step, "float32")
        distance = f.maximum(f.abs(2.0 * h - 1.0), f.number(2.0**-60))
        term = f.sum(1.0 - f.exp(beta * f.log(distance)))
        lasts = f.all_of(step >= float(self.beta.t_start), step < float(self.beta.t_end))
        term = term * f.where(lasts, f.number(self.regularization_weight), f.number(0.0))
        return term if other is None else term + other
