"""Deployed quantizers without a framework: their table, and a grid as the arguments of mctq's Keras classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import QParams, from_params, inferable_params

_NAMES = {THRESHOLD: "threshold", RANGE_MIN: "min_range", RANGE_MAX: "max_range"}


def mctq_arguments(
    qparams: QParams, n_bits: int, ndim: int, target: QuantizationTarget, method: QuantizationMethod
) -> dict[str, Any]:
    """Return the arguments that build mctq's Keras inferable quantizer of a grid, JSON-clean.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers.
    n_bits : int
        Width of the codes.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    target, method
        Which class.
    """
    params = inferable_params(qparams, method)
    signed = params.pop(SIGNED, None)
    arguments: dict[str, Any] = {"num_bits": n_bits}
    arguments |= {_NAMES[key]: value if isinstance(value, list) else [value] for key, value in params.items()}
    if target is QuantizationTarget.Weights:
        axis = qparams.channels_axis
        per_channel = axis is not None
        return {
            **arguments,
            "per_channel": per_channel,
            "channel_axis": None if axis is None else axis % ndim,
            "input_rank": ndim,
        }
    return arguments if signed is None else {**arguments, "signed": signed}


def grid_of_arguments(config: Mapping[str, Any], method: QuantizationMethod) -> tuple[QParams, int, int]:
    """Return grid, width and number of dimensions that `mctq_arguments` was called with."""
    params = {key: config[name] for key, name in _NAMES.items() if name in config}
    axis = config.get("channel_axis") if config.get("per_channel", False) else None
    if axis is None:
        params = {key: value[0] for key, value in params.items()}
    n_bits, signed = config["num_bits"], config.get("signed", True)
    qparams = from_params(method, n_bits, signed, params, channels_axis=axis)
    if method is QuantizationMethod.UNIFORM:
        qparams = _exact(params, qparams)
    return qparams, n_bits, config.get("input_rank") or 0


def _exact(params: Mapping[str, Any], derived: QParams) -> QParams:
    """Return the grid whose ends are a range, where there is one; else the derived grid, which bounds ranges."""
    low, high = (np.asarray(params[key], np.float64) for key in (RANGE_MIN, RANGE_MAX))
    scale = (high - low) / derived.quant_max  # exact for a nudged range: code * scale is
    zero_point = np.rint(-low / scale)
    if np.any(scale != scale.astype(np.float32)) or np.any(zero_point * scale != -low):
        return derived
    return replace(derived, scale=scale.astype(np.float32), zero_point=zero_point.astype(np.int32))


T = TypeVar("T", bound=type)


def target_and_method(cls: Any) -> tuple[QuantizationTarget, QuantizationMethod]:
    """Return what a class with mctq's mark quantizes, and on which grid."""
    return QuantizationTarget[cls.quantization_target.name], QuantizationMethod[cls.quantization_method[0].name]


def by_grid(*classes: T) -> dict[tuple[QuantizationTarget, QuantizationMethod], T]:
    """Return a backend's deployed classes by what they quantize and on which grid."""
    return {target_and_method(cls): cls for cls in classes}


class KerasDeployed:
    """What a Keras backend's deployed quantizer is beside a layer: a grid in variables, told as mctq tells it."""

    quantization_target: ClassVar[Any]
    quantization_method: ClassVar[Any]

    grid_scale: Any
    grid_zero_point: Any
    channel_axis: int | None
    input_rank: int
    num_bits: int
    quant_min: int
    quant_max: int

    @staticmethod
    def to_numpy(value: Any) -> NDArray[Any]:
        """Return a variable's value."""
        raise NotImplementedError

    def start(self, qparams: QParams, n_bits: int, ndim: int) -> None:
        """Set what is no variable; called once, by the constructor.

        Parameters
        ----------
        qparams : QParams
            The grid's numbers.
        n_bits : int
            Width of the codes.
        ndim : int
            Number of dimensions of the weights tensor; 0 for activations.
        """
        self.channel_axis = qparams.channels_axis
        self.per_channel = qparams.channels_axis is not None
        self.input_rank = ndim
        self.num_bits = n_bits
        self.quant_min, self.quant_max = qparams.quant_min, qparams.quant_max

    @classmethod
    def method(cls) -> QuantizationMethod:
        """Return the grid's method."""
        return target_and_method(cls)[1]

    @property
    def qparams(self) -> QParams:
        """The grid's numbers, from the variables."""
        shape = () if self.channel_axis is None else (-1,)
        scale, zero_point = (self.to_numpy(each).reshape(shape) for each in (self.grid_scale, self.grid_zero_point))
        return QParams(scale, zero_point.astype(np.int32), self.quant_min, self.quant_max, self.channel_axis)

    @property
    def params(self) -> dict[str, Any]:
        """Threshold or nudged range, as in the configs."""
        return inferable_params(self.qparams, self.method())

    def mctq_arguments(self) -> dict[str, Any]:
        """Return the arguments that build mctq's stock quantizer."""
        target, method = target_and_method(type(self))
        return mctq_arguments(self.qparams, self.num_bits, self.input_rank, target, method)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:  # noqa: ARG002 - mctq's signature
        """Do nothing: the numbers are there from the start."""
        return {}
