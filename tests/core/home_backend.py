"""Quantizers of a backend whose tensors are NumPy arrays: the least there can be, for what core does with any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.quantizer import BaseTrainableQuantizer

GRIDS = tuple(method for method in QuantizationMethod if method not in LUT_METHODS)


class HomeQuantizer(BaseTrainableQuantizer):
    """Its variables are arrays, and all of them are trained; with candidates it keeps them all and deploys the last."""

    backend = "home"
    quantization_method: ClassVar[Any] = GRIDS
    identifier: ClassVar[Any] = "HOME"

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the candidates, or the config's own."""
        return tuple(c.n_bits for c in self.quantization_config.candidates or []) or super().widths

    @property
    def selected_width(self) -> int:
        """The last candidate's."""
        return self.widths[-1]

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own an array."""
        self._variable_groups[name] = group
        setattr(self, name, np.array(variable, np.float32))

    def get_trainable_variables(self, group: VariableGroup) -> Sequence[Any]:
        """Return the arrays of one group."""
        return [getattr(self, name) for name, own in self._variable_groups.items() if own is group]

    def to_numpy(self, variable: Any) -> NDArray[Any]:
        """Return a copy."""
        return np.array(variable)

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Write into the array."""
        variable[...] = value

    def convert2inferable(self) -> Deployed:
        """Return the numbers that describe a deployed quantizer."""
        config = self.current_config()
        return Deployed(config.quantization_params, config.n_bits)


class HomeWeights(HomeQuantizer):
    """For weights."""

    quantization_target = QuantizationTarget.Weights


class HomeActivation(HomeQuantizer):
    """For activations."""

    quantization_target = QuantizationTarget.Activation


class WarmWeights(HomeWeights):
    """With an argument of its own."""

    identifier = "WARM"

    def __init__(
        self,
        quantization_config: TrainableQuantizerWeightsConfig,
        freeze_quant_params: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.temperature = temperature


class Deployed:
    """What core asks of an inferable quantizer."""

    def __init__(self, params: dict[str, Any], num_bits: int) -> None:
        self.params, self.num_bits = params, num_bits


def weights_config(
    params: Any = None, *, method: Any = "SYMMETRIC", n_bits: Any = 4, **fields: Any
) -> TrainableQuantizerWeightsConfig:
    """Return a weights config; without params it is not calibrated."""
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method=method,
        weights_n_bits=n_bits,
        weights_quantization_params={} if params is None else params,
        **fields,
    )


def activation_config(
    params: Any = None, *, method: Any = "SYMMETRIC", n_bits: Any = 4, **fields: Any
) -> TrainableQuantizerActivationConfig:
    """Return an activation config; without params it is not calibrated."""
    return TrainableQuantizerActivationConfig(
        activation_quantization_method=method,
        activation_n_bits=n_bits,
        activation_quantization_params={} if params is None else params,
        **fields,
    )


def candidates(*widths: int) -> list[TrainableQuantizerCandidateConfig]:
    """Return candidates without params of their own."""
    return [TrainableQuantizerCandidateConfig(n_bits=width) for width in widths]


def weights_quantizer(
    config: TrainableQuantizerWeightsConfig, shape: tuple[int, ...] | None = (2, 3), cls: type[Any] = HomeWeights
) -> Any:
    """Return a quantizer called ``fc.weight`` with its variables."""
    quantizer = cls(config)
    quantizer.subject = "fc.weight"
    quantizer.initialize_quantization(shape, "weight", None)
    return quantizer


def activation_quantizer(config: TrainableQuantizerActivationConfig) -> HomeActivation:
    """Return a quantizer called ``fc: input`` with its variables."""
    quantizer = HomeActivation(config)
    quantizer.subject = "fc: input"
    quantizer.initialize_quantization(None, "activation", None)
    return quantizer
