"""Between a grid and the arguments of mctq's Keras inferable quantizers: the numbers only, no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.qparams import QParams, deployed_params, from_params

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
    params = deployed_params(qparams, method)
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
