# ruff: noqa: ARG002, FBT001, FBT002 - signatures are those of the base class
"""Differentiable soft quantization (Gong et al., ICCV 2019): what every framework shares, in NumPy.

Between two codes, the paper replaces the step by ``tanh(k * (v - middle)) / (1 - alpha)``, with
``k = log(2 / alpha - 1)``: the smaller `alpha` is, the nearer this is to rounding. `alpha` is trained, one for each
threshold, and a term of the loss pulls it to 0 with a weight that grows by a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mct_quantizers import QuantizationMethod
from numpy.typing import NDArray

from trainable_core import LinearAnnealingScheduler
from trainable_core.errors import InvalidArgumentError
from trainable_core.reference.method import OwnVariable

METHODS = [QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")]
LOWEST, HIGHEST = 0.05, 0.45

Array = NDArray[Any]


class Dsq:
    """What is declared, and the options; a framework's estimator comes between this and its base class.

    Parameters
    ----------
    config, freeze_quant_params
        As in the base class.
    soft_steps : int
        Number of training steps with soft values; the deployed ones follow.
    alpha_weight : float
        Weight of the term of the loss at the end of the soft steps.
    """

    learns_grid = True
    counts_steps = True
    training_forward = "soft"
    own_variables = (OwnVariable("alpha", per_channel=True, initial=0.3),)
    conformance_arguments = ({"soft_steps": 3, "alpha_weight": 0.5},)
    scheduler: type[LinearAnnealingScheduler]

    def __init__(
        self, config: Any, freeze_quant_params: bool = False, soft_steps: int = 1000, alpha_weight: float = 0.1
    ) -> None:
        if not isinstance(soft_steps, int) or isinstance(soft_steps, bool) or soft_steps < 1:
            raise InvalidArgumentError("DSQ: soft_steps", f"must be a positive whole number, got {soft_steps!r}")
        if not 0 <= alpha_weight < float("inf"):
            raise InvalidArgumentError("DSQ: alpha_weight", f"must be >= 0 and finite, got {alpha_weight!r}")
        super().__init__(config, freeze_quant_params)  # type: ignore[call-arg] # the base class's
        self.soft_steps, self.alpha_weight = soft_steps, float(alpha_weight)
        self.schedule_end = soft_steps + 1
        self.weight_at = self.scheduler(0, soft_steps, 0.0, self.alpha_weight)

    def get_arguments(self) -> dict[str, float]:
        """Return the options."""
        return {"soft_steps": self.soft_steps, "alpha_weight": self.alpha_weight}

    def surrogate(self, x: Array, grid: Any, upstream: Array, values: Array, variables: Mapping[str, Array]) -> Any:
        """Return what the backward pass differentiates: the soft quantization, moved to the values of the forward."""
        soft = soft_quantization(x, grid)
        error = values / grid.scale - soft(x, grid, variables)
        return lambda x, grid, variables: (soft(x, grid, variables) + error) * grid.scale

    def penalty(self, variables: Mapping[str, Array], steps: int) -> float:
        """Return the term of the loss, in NumPy; the first training step has counted one."""
        return float(self.weight_at(max(steps - 1, 0)) * np.clip(variables["alpha"], LOWEST, HIGHEST).mean())


def soft_quantization(at: Array, grid: Any) -> Callable[[Array, Any, Mapping[str, Array]], Array]:
    """Return the function of equations 3 to 6, in steps of the grid, in the intervals in which `at` is."""
    steps = _clipped(at, grid)
    middle = np.floor(steps) + 0.5
    inside = (steps > grid.quant_min - grid.zero_point) & (steps < grid.quant_max - grid.zero_point)

    def soft(x: Array, grid: Any, variables: Mapping[str, Array]) -> Array:
        alpha = np.clip(variables["alpha"], LOWEST, HIGHEST)
        phi = np.tanh(np.log(2 / alpha - 1) * (_clipped(x, grid) - middle)) / (1 - alpha)
        return np.where(inside, middle + phi / 2, _clipped(x, grid))

    return soft


def _clipped(x: Array, grid: Any) -> Array:
    return np.clip(x / grid.scale, grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)
