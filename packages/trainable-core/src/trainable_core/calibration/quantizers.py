"""Calibrated params for a quantizer: for each of its widths, from what was seen or from the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.observer import Observer
from trainable_core.calibration.params import calibrate_activation, calibrate_weights
from trainable_core.calibration.tables import (
    calibrate_activation_levels,
    calibrate_activation_table,
    calibrate_levels,
    calibrate_table,
)
from trainable_core.constants import SIGNED
from trainable_core.errors import CalibrationError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.sections import CalibrationSection

Params = dict[int, dict[str, Any]]


def activation_params(quantizer: BaseTrainableQuantizer, observer: Observer, section: CalibrationSection) -> Params:
    """Return an activation quantizer's params, by width, from what its tensor looked like.

    Raises
    ------
    CalibrationError
        When nothing was seen; names the tensor.
    """
    if observer.empty:
        raise CalibrationError(
            quantizer.subject,
            "no batch reached it",
            "leave the layer out by a rule with skip: true, or calibrate with batches that use it.",
        )
    config = quantizer.quantization_config
    signed = config.quantization_params.get(SIGNED)
    if signed is None:
        signed = bool(observer.minimum < 0)  # one sign for every width
    table: dict[str, Any] = {
        "calibration_method": section.activations,
        "quantization_method": config.quantization_method,
        "signed": signed,
        "min_threshold": config.min_threshold,
        "percentile": section.percentile,
        "p": section.p,
    }
    with _named(quantizer):
        if quantizer.learns_levels:
            found = calibrate_activation_levels(observer, 2**config.n_bits, **table)
            return dict.fromkeys(quantizer.widths, found)
        if levels := quantizer.levels_with(signed=signed):
            return dict.fromkeys(quantizer.widths, calibrate_activation_table(observer, levels, **table))
        return {
            width: calibrate_activation(
                observer,
                calibration_method=section.activations,
                quantization_method=config.quantization_method,
                n_bits=width,
                signed=signed,
                min_threshold=config.min_threshold,
                percentile=section.percentile,
                p=section.p,
            )
            for width in quantizer.widths
        }


def weights_params(
    quantizer: BaseTrainableQuantizer,
    weights: NDArray[Any],
    section: CalibrationSection,
    widths: Sequence[int] | None = None,
) -> Params:
    """Return a weights quantizer's params, by width, from the weights.

    Parameters
    ----------
    quantizer : BaseTrainableQuantizer
        The quantizer.
    weights : array
        The weights.
    section : CalibrationSection
        How thresholds are found.
    widths : sequence of int, optional
        By default the quantizer's own.

    Raises
    ------
    CalibrationError
        When the weights are empty or not finite; names the tensor.
    """
    config = quantizer.quantization_config
    values = np.asarray(weights)
    if config.blocks is not None:
        values = config.blocks.rows(values)
    with _named(quantizer):
        if quantizer.learns_levels:
            found = calibrate_levels(
                values,
                2**config.n_bits,
                quantization_method=config.quantization_method,
                channels_axis=config.channels_axis,
                min_threshold=config.min_threshold,
            )
            return dict.fromkeys(quantizer.widths, found)
        return {
            width: calibrate_table(
                values,
                quantizer.levels,
                calibration_method=section.weights,
                quantization_method=config.quantization_method,
                channels_axis=config.channels_axis,
                min_threshold=config.min_threshold,
                p=section.p,
            )
            if quantizer.levels
            else calibrate_weights(
                values,
                calibration_method=section.weights,
                quantization_method=config.quantization_method,
                n_bits=width,
                channels_axis=config.channels_axis,
                min_threshold=config.min_threshold,
                percentile=section.percentile,
                p=section.p,
            )
            for width in (quantizer.widths if widths is None else widths)
        }


def set_all(new: Sequence[tuple[BaseTrainableQuantizer, Params]]) -> None:
    """Give quantizers their params: all of them, or, when that fails or is interrupted, none."""
    before = [
        (q, q.signed, q.calibrated, q.numbers_set, [np.array(q.to_numpy(each)) for each in _variables(q)])
        for q, _ in new
    ]
    try:
        for quantizer, params in new:
            quantizer.set_quantization_params(params)
    except BaseException:
        for quantizer, signed, calibrated, numbers, values in before:
            for variable, value in zip(_variables(quantizer), values, strict=True):
                quantizer.assign(variable, value)
            quantizer.signed, quantizer.calibrated = signed, calibrated
            vars(quantizer)["numbers_set"] = numbers
        raise


def _variables(quantizer: BaseTrainableQuantizer) -> list[Any]:
    return [quantizer.get_quantizer_variable(name) for name in quantizer.variable_names]


@contextmanager
def _named(quantizer: BaseTrainableQuantizer) -> Iterator[None]:
    """Let a calibration error say which tensor it is about."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(quantizer.subject, error.problem) from error
