"""Parameterized clipping activation; defined by `trainable_core.reference.pact`."""

from __future__ import annotations

from typing import Any

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.reference import pact
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class PactQuantizer(KerasQuantizer):
    """The clipping bound learns from what is beyond it; see `trainable_core.reference.pact`.

    Parameters
    ----------
    quantization_config, freeze_quant_params
        As in the base class.
    calibrated_gradient : bool
        Whether the rounding error inside the range counts too.
    """

    declaration = pact.METHOD

    def __init__(
        self,
        quantization_config: TrainableQuantizerConfig,
        freeze_quant_params: bool = False,  # noqa: FBT001, FBT002 - the seed's signature
        calibrated_gradient: bool = False,  # noqa: FBT001, FBT002 - a recipe gives it by name
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.calibrated_gradient = pact.checked_option(calibrated_gradient, type(self).__name__)

    def get_arguments(self) -> dict[str, Any]:
        """Return the option."""
        return {"calibrated_gradient": self.calibrated_gradient}

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid."""
        f, (low, high), scale = self.functions, grid.ends, self.functions.stop_gradient(grid.scale)
        steps = f.steps_of(f.stop_gradient(x), scale, grid.quant_min, grid.quant_max, centered=grid.centered)
        below, above, zeros = steps < low, steps >= high, f.zeros_like(x)
        inside = f.all_of(steps >= low, steps < high)
        slope = f.where(above, zeros + high, f.where(below, zeros + low, zeros))
        if self.calibrated_gradient:
            slope = f.where(inside, self.ops.round_half_up(steps) - steps, slope)
        d_zero = f.where(f.any_of(below, above), zeros - scale, zeros)
        return self.ops.by_slopes(x, grid, f.where(inside, zeros + 1.0, zeros), slope, d_zero)
