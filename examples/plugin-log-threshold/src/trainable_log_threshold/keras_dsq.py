# ruff: noqa: D101, D102, FBT001 - signatures and meaning are those of the base class
"""DSQ for Keras 3 and Keras 2."""

from typing import Any

from trainable_keras.quantizers import KerasQuantizer
from trainable_log_threshold import dsq


class DsqQuantizer(dsq.Dsq, KerasQuantizer):
    def alpha_for(self, ndim: int | None = None) -> Any:
        f = self.functions
        return f.minimum(f.maximum(self.read_variable("alpha", ndim), dsq.LOWEST), dsq.HIGHEST)

    def fake_quantize(self, x: Any, grid: Any, training: bool) -> Any:
        f, alpha = self.functions, self.alpha_for(self.functions.rank(x))
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = f.minimum(f.maximum(grid.steps(x), low), high)
        here = f.stop_gradient(steps)
        middle = f.floor(here) + 0.5
        soft = middle + f.tanh(f.log(2.0 / alpha - 1.0) * (steps - middle)) / (1.0 - alpha) / 2.0
        soft = f.where(f.all_of(steps > low, steps < high), soft, steps)  # the ends of the range are its ends
        codes = self.ops.round_half_up(here)
        values = self.until(self.schedule_end, f.stop_gradient(soft), codes) if training else codes
        return self.ops.straight_through(values, soft) * grid.scale

    def regularization(self) -> Any:
        f, alpha = self.functions, self.alpha_for()
        return f.cast(self.weight_at(self.current_step), "float32") * f.sum(alpha) / f.size(alpha)
