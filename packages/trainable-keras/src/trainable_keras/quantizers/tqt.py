"""Trained quantization thresholds; defined by `trainable_core.reference.tqt`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from trainable_core.constants import THRESHOLD
from trainable_core.reference import tqt
from trainable_keras.functions import Tensor
from trainable_keras.grid import Grid
from trainable_keras.quantizers.base import KerasQuantizer


class TqtQuantizer(KerasQuantizer):
    """The logarithm of the threshold learns with the weights; see `trainable_core.reference.tqt`."""

    declaration = tqt.METHOD

    def encode_grid(self, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the logarithm of the threshold."""
        return tqt.encode_grid(numbers)

    def decode_grid(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the threshold."""
        return {THRESHOLD: self.ops.exp2(variables[tqt.LOG2_THRESHOLD])}

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: ARG002, FBT001 - the base's signature
        """Return `x` on the grid; what is rounded to a code of it counts as inside."""
        f, (low, high) = self.functions, grid.ends
        steps = f.stop_gradient(grid.steps(x))
        codes, zeros = self.ops.round_half_up(steps), f.zeros_like(x)
        inside = f.all_of(codes >= low, codes <= high)
        edge = f.where(codes > high, zeros + high, f.where(codes < low, zeros + low, zeros))
        return self.ops.by_slopes(x, grid, f.where(inside, zeros + 1.0, zeros), f.where(inside, codes - steps, edge))
