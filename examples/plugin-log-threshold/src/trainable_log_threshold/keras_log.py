# ruff: noqa: ARG002, D101, D102, FBT001 - signatures and meaning are those of the base class
"""LOG_THRESHOLD for Keras 3 and Keras 2."""

from typing import Any

from trainable_keras.quantizers import KerasQuantizer
from trainable_log_threshold.log import Array, encode, surrogate


class LogQuantizer(KerasQuantizer):
    learns_grid = True
    grid_parameters = ("log2_threshold",)

    def encode_grid(self, numbers: dict[str, Array]) -> dict[str, Array]:
        return encode(numbers)

    def decode_grid(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"threshold": self.ops.exp2(variables["log2_threshold"])}

    def fake_quantize(self, x: Any, grid: Any, training: bool) -> Any:
        f, steps, (low, high) = self.functions, grid.steps(x), grid.ends
        codes = self.ops.round_half_up(f.stop_gradient(steps))
        snapped = f.minimum(f.maximum(codes, low), high)
        inside = f.all_of(codes >= low, codes <= high)
        return self.ops.straight_through(snapped, f.where(inside, steps, snapped)) * grid.scale

    def surrogate(self, x: Array, grid: Any, upstream: Array) -> Any:
        return surrogate(x, grid)
