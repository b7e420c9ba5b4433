"""How well the grid of one quantizer fits the values that it gets, in figures that need no tensor to be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration import Observer, calibrate_activation
from trainable_core.calibration.quantizers import weights_params
from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import SIGNED
from trainable_core.enums import CalibrationMethod
from trainable_core.qparams import QParams, from_params
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.sections import CalibrationSection
from trainable_core.reference import affine

Array = NDArray[Any]

HISTOGRAM_BITS = 10
"""Widest grid whose error is computed from a histogram: at 10 bits a step is as wide as four of its bins."""

OFF_GRID = 0.01
"""Share of the values that may differ from the nearest codes of the grid where nothing but rounding is at work."""


def decibels(signal: float, noise: float) -> float:
    """Return ``10 * log10(signal / noise)``: infinite without noise, and 0 of nothing but zeros.

    Examples
    --------
    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(0.0, 0.0)
    (20.0, inf, 0.0)
    """
    if noise <= 0:
        return math.inf if signal > 0 else 0.0
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass(frozen=True, kw_only=True)
class GridQuality:
    """How well a grid fits the values that were quantized on it.

    Parameters
    ----------
    sqnr : float
        Ratio of the values' energy to that of the error, in decibels.
    calibrated_sqnr : float or None
        The same with thresholds of least squared error for these values, at the same width and granularity. None where
        the values are not those of the nearest codes, or the grid has more than 10 bits and the values are an
        activation's.
    clipped : float
        Share of the values that are rounded to a code beyond the grid's ends; of a look-up table, beyond its threshold.
    unused : float or None
        Share of the grid's codes that no value has; over all channels together. None where there is no grid of its own.
    low, high : float
        Lowest and highest real value of the grid; over all channels together. NaN where there is no grid of its own.
    minimum, maximum : float
        Lowest and highest value seen.
    count : int
        Number of values seen.
    not_finite : int
        How many more were NaN or infinite; they are in no other figure.
    """

    sqnr: float
    calibrated_sqnr: float | None
    clipped: float
    unused: float | None
    low: float
    high: float
    minimum: float
    maximum: float
    count: int
    not_finite: int


class QualityMeter:
    """Sums up what a quantizer is given and what it returns, batch by batch.

    Parameters
    ----------
    config : TrainableQuantizerConfig
        What is quantized, and on which grid.
    qparams : QParams or None
        The grid as it is deployed; None where it is computed from each tensor.
    tells_codes : bool
        Whether the values returned are values of the grid.
    """

    def __init__(self, config: TrainableQuantizerConfig, qparams: QParams | None, *, tells_codes: bool = True) -> None:
        self.config, self.qparams = config, qparams
        self.observer = Observer()
        self._signal = self._noise = 0.0
        self._clipped = self._not_finite = self._differing = self._compared = 0
        self._used: NDArray[np.bool_] | None = None
        if qparams is not None and tells_codes:
            self._used = np.zeros(qparams.quant_max - qparams.quant_min + 1, np.bool_)

    def update(self, values: Array, quantized: Array) -> None:
        """Take in values, float32, and what the quantizer made of them, of the same shape."""
        if self.config.blocks is not None:
            values, quantized = self.config.blocks.rows(values), self.config.blocks.rows(quantized)
        finite = np.isfinite(values) & np.isfinite(quantized)
        missing = int(values.size - np.count_nonzero(finite))
        self._not_finite += missing
        if missing:
            values, quantized = np.where(finite, values, 0), np.where(finite, quantized, 0)
        self.observer.update(values[finite] if missing else values)
        self._signal += _energy(values)
        self._noise += _energy(quantized.astype(np.float64) - values)
        if self.qparams is None:
            return
        steps = affine.steps(values, self.qparams)
        low, high = affine.ends(self.qparams, values.ndim)
        self._clipped += int(np.count_nonzero((steps < low - 0.5) | (steps > high + 0.5)))
        if self._used is not None:
            self._note_codes(values, quantized)

    def _note_codes(self, values: Array, quantized: Array) -> None:
        """Note which codes there are, and in how many of the first batch's values they are not the nearest ones."""
        assert self.qparams is not None  # noqa: S101 - who calls this has looked
        assert self._used is not None  # noqa: S101 - as above
        codes = affine.quantize(quantized, self.qparams)
        self._used |= np.bincount(codes.ravel() - self.qparams.quant_min, minlength=self._used.size) > 0
        if not self._compared:
            nearest = affine.fake_quantize(values, self.qparams)
            # half a step: a value beside a tie may go either way
            apart = np.abs(nearest - quantized) > 0.5 * self.qparams.along(values.ndim).scale
            self._differing, self._compared = int(np.count_nonzero(apart)), values.size

    @property
    def empty(self) -> bool:
        """Whether no value was seen, not even one that is not finite."""
        return self.observer.empty and not self._not_finite

    def quality(self, calibrated_sqnr: float | None) -> GridQuality:
        """Return the figures of what was seen so far."""
        if self.qparams is None:
            low = high = math.nan
        else:
            codes = self.qparams.levels or (self.qparams.quant_min, self.qparams.quant_max)
            ends = [
                (end - self.qparams.zero_point) * self.qparams.scale.astype(np.float64) for end in (codes[0], codes[-1])
            ]
            low, high = float(np.min(ends[0])), float(np.max(ends[1]))
        count = self.observer.count
        return GridQuality(
            sqnr=decibels(self._signal, self._noise),
            calibrated_sqnr=calibrated_sqnr,
            clipped=self._clipped / count if count else 0.0,
            unused=self._unused(),
            low=low,
            high=high,
            minimum=self.observer.minimum if count else math.nan,
            maximum=self.observer.maximum if count else math.nan,
            count=count,
            not_finite=self._not_finite,
        )

    def _unused(self) -> float | None:
        if self._used is None or self.qparams is None:
            return None
        used = self._used
        if self.qparams.levels:
            used = used[np.asarray(self.qparams.levels) - self.qparams.quant_min]
        return 1 - float(np.count_nonzero(used)) / used.size

    @property
    def rounds_to_nearest(self) -> bool:
        """Whether what came out is what rounding to the nearest codes gives, nearly everywhere."""
        return self._used is not None and self._differing <= OFF_GRID * self._compared

    def calibrated_activation(self) -> float | None:
        """Return the SQNR that thresholds of least squared error would have, from the histogram of what was seen.

        None where nothing was seen, and of a table, whose levels may learn.
        """
        if self.qparams is None or self.observer.empty or not self.rounds_to_nearest or self.qparams.levels:
            return None
        n_bits = (self.qparams.quant_max - self.qparams.quant_min).bit_length()
        if n_bits > HISTOGRAM_BITS:
            return None
        params = calibrate_activation(
            self.observer,
            calibration_method=CalibrationMethod.MSE,
            quantization_method=self.config.quantization_method,
            n_bits=n_bits,
            min_threshold=self.config.min_threshold,
        )
        signed = bool(params.get(SIGNED, True))
        grid = from_params(self.config.quantization_method, n_bits, signed, params, self.config.min_threshold)
        counts = self.observer.counts
        edges = self.observer.edges
        centres = np.clip((edges[:-1] + edges[1:]) / 2, self.observer.minimum, self.observer.maximum)
        error = affine.fake_quantize(centres, grid) - centres
        return decibels(float(np.dot(counts, centres**2)), float(np.dot(counts, error**2)))


def calibrated_weights(quantizer: BaseTrainableQuantizer, values: Array) -> float | None:
    """Return the SQNR that a weight would have with thresholds of least squared error.

    Parameters
    ----------
    quantizer : BaseTrainableQuantizer
        Of one width.
    values : float32 array
        The weight, finite.
    """
    if len(quantizer.widths) != 1 or not values.size:
        return None
    signal = _energy(values)
    return decibels(signal, _energy(requantized(quantizer, values, quantizer.selected_width) - values))


def requantized(
    quantizer: BaseTrainableQuantizer,
    values: Array,
    n_bits: int,
    section: CalibrationSection | None = None,
    params: dict[str, Any] | None = None,
) -> Array:
    """Return a weight quantized anew, with another width and thresholds for it.

    Parameters
    ----------
    quantizer : BaseTrainableQuantizer
        Says on which kind of grid, with which granularity.
    values : float32 array
        The weight.
    n_bits : int
        The width.
    section : CalibrationSection, optional
        How thresholds are found; by default those of least squared error.
    params : dict, optional
        The thresholds, where they were found before.

    Returns
    -------
    float32 array, shape of `values`
    """
    config = quantizer.quantization_config
    if params is None:
        params = width_params(quantizer, values, n_bits, section or CalibrationSection())
    grid = from_params(
        config.quantization_method,
        n_bits,
        signed=True,
        params=params,
        min_threshold=config.min_threshold,
        channels_axis=config.channels_axis,
    )
    if config.blocks is None:
        return affine.fake_quantize(values, grid)
    return config.blocks.tensor(affine.fake_quantize(config.blocks.rows(values), grid), values.shape)


def width_params(
    quantizer: BaseTrainableQuantizer, values: Array, n_bits: int, section: CalibrationSection
) -> dict[str, Any]:
    """Return the thresholds that calibration gives a weight at a width."""
    return weights_params(quantizer, values, section, (n_bits,))[n_bits]


def _energy(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())
