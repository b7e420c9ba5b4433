# ruff: noqa: ARG002, D102, FBT001, FBT002 - signatures and meaning are those of the base class
"""EWGS for Keras."""

from collections.abc import Callable
from typing import Any

from keras import ops
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from numpy.typing import NDArray

from trainable_ewgs.surrogate import Surrogate, checked, ewgs
from trainable_keras import BaseKerasTrainableQuantizer, Grid

METHODS = [QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")]


@ops.custom_gradient
def round_ewgs(steps: Any, factor: Any) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Round ties up, with equation 4 as the gradient."""
    codes = ops.floor(steps) + ops.cast(steps - ops.floor(steps) >= 0.5, "float32")  # noqa: PLR2004 - a tie

    def backward(*given: Any, upstream: Any = None) -> tuple[Any, Any]:
        upstream = given[0] if upstream is None else upstream
        return upstream * (1 + ops.sign(upstream) * (steps - codes) * factor), ops.zeros_like(factor)

    return codes, backward


class EwgsQuantizer(BaseKerasTrainableQuantizer):
    """Element-wise gradient scaling; `delta` 0 is the straight-through estimator."""

    learns_grid = True
    conformance_arguments = ({"delta": 0.5},)

    def __init__(self, quantization_config: Any, freeze_quant_params: bool = False, delta: float = 1e-3) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.delta = checked(delta)

    def get_arguments(self) -> dict[str, float]:
        return {"delta": self.delta}

    def fake_quantize(self, x: Any, grid: Grid, training: bool) -> Any:
        low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
        steps = ops.minimum(ops.maximum(grid.steps(x), low), high)
        factor = ops.cast(self.delta / (grid.quant_max - grid.quant_min), "float32")
        return round_ewgs(steps, factor) * grid.scale

    def surrogate(self, x: NDArray[Any], grid: Any, upstream: NDArray[Any]) -> Surrogate:
        return ewgs(x, grid, upstream, self.delta)


@mark_quantizer(QuantizationTarget.Weights, METHODS, "EWGS")
class EwgsWeightsQuantizer(EwgsQuantizer):
    """EWGS for weights."""


@mark_quantizer(QuantizationTarget.Activation, METHODS, "EWGS")
class EwgsActivationQuantizer(EwgsQuantizer):
    """EWGS for activations."""
