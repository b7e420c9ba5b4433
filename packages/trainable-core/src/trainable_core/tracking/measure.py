"""What is measured of a quantizer at one step of a training, and what is remembered for the next time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.codes import SAMPLE, CodeCounter, ends_of, number_of_codes, places_of, sample_of
from trainable_core.backend.view import ModelView, QuantizedTensor
from trainable_core.qparams import Float32, QParams
from trainable_core.quantizer import BaseTrainableQuantizer

Numbers = dict[str, float]
"""Numbers by the name of the quantity."""

QUANTITIES = {
    "bits": "width of the codes, where a method chooses it",
    "low": "lower end of the grid, in the units of the tensor; the mean over the channels",
    "high": "upper end of the grid, likewise",
    "scale_min": "smallest step of any channel",
    "scale_max": "largest step of any channel",
    "moved": "largest relative change of a step since the tracking began",
    "gradient": "norm of the gradient of all variables of the quantizer",
    "clipped": "share of the values that lie farther beyond the grid's ends than half a step",
    "codes_used": "share of the grid's codes that are in use",
    "changed": "share of the weights whose codes are others than at the last record",
    "returned": "share of the weights whose codes changed, and against the direction of their last change",
    "largest": "largest absolute value of an activation",
    "oscillating": "share of the weights that oscillate, as a modifier counts them",
    "frozen": "share of the weights whose codes are frozen, likewise",
    "float": "share of the values that gradual quantization leaves float",
    "mean": "largest absolute moving mean of a batch norm's channels",
    "variance": "largest moving variance of a batch norm's channels",
}
"""What each quantity is."""


@dataclass
class WeightMemory:
    """What is remembered of a weight's codes, of a sample of them."""

    codes: NDArray[np.int32] | None = None
    direction: NDArray[np.int8] | None = None

    def compared(self, codes: NDArray[np.int32]) -> Numbers:
        """Return which codes changed since the last time, and remember these.

        Examples
        --------
        >>> memory = WeightMemory()
        >>> [memory.compared(np.int32([code])) for code in (0, 1, 0)][1:]
        [{'changed': 1.0, 'returned': 0.0}, {'changed': 1.0, 'returned': 1.0}]
        """
        if self.codes is None or self.direction is None or self.codes.shape != codes.shape:
            self.codes, self.direction = codes, np.zeros(codes.shape, np.int8)
            return {}
        change = np.sign(codes - self.codes).astype(np.int8)
        moved = change != 0
        returned = moved & (change == -self.direction)
        self.codes, self.direction = codes, np.where(moved, change, self.direction)
        return {"changed": _share(moved), "returned": _share(returned)}


def grid_numbers(grid: QParams, first: Float32 | None) -> Numbers:
    """Return what there is to say of a grid.

    Parameters
    ----------
    grid : QParams
        As it is now.
    first : float32 array or None
        Its scales when the tracking began.
    """
    low, high = ends_of(grid)
    scale = grid.scale.astype(np.float64)
    numbers = {"low": low, "high": high, "scale_min": float(scale.min()), "scale_max": float(scale.max())}
    if first is not None and first.shape == scale.shape:
        numbers["moved"] = float(np.max(np.abs(scale / first - 1)))
    return numbers


def weight_numbers(view: ModelView, tensor: QuantizedTensor, grid: QParams, memory: WeightMemory) -> Numbers:
    """Return what there is to say of a weight on its grid."""
    sample = sample_of(view.values(tensor), view.quantized(tensor), grid, tensor.blocks)
    if not sample.codes.size:
        return {}
    used = np.unique(sample.codes).size / number_of_codes(grid)
    numbers = {"clipped": _share(sample.clipped)} if tensor.clips else {}
    return {**numbers, "codes_used": used, **memory.compared(sample.codes)}


class ActivationNumbers:
    """Takes in the values of an activation; of each call at most `SAMPLE` for all but the largest.

    Parameters
    ----------
    grid : QParams
        As it is now.
    """

    def __init__(self, grid: QParams) -> None:
        self.counter = CodeCounter(grid)
        self.largest = 0.0
        self.seen = 0

    def update(self, values: NDArray[np.generic], _quantized: object = None) -> None:
        """Take in the values of a call."""
        flat = np.asarray(values).reshape(-1)
        if flat.size:
            self.seen += flat.size
            self.largest = float(np.maximum(self.largest, np.max(np.abs(flat))))  # NaN where any of them is
            self.counter.update(flat[places_of(flat.size, SAMPLE)])

    def numbers(self) -> Numbers:
        """Return what was found; nothing where no value came."""
        counter = self.counter
        if not counter.count:
            return {}
        used = np.count_nonzero(counter.counts) / number_of_codes(counter.grid)
        return {"clipped": counter.clipped / counter.count, "codes_used": float(used), "largest": self.largest}


def reported(quantizer: object) -> Numbers:
    """Return what a quantizer tells of itself: the shares of its modifiers, and its width where it chooses one."""
    if not isinstance(quantizer, BaseTrainableQuantizer):
        return {}
    numbers = {name: float(value) for told in quantizer.report().values() for name, value in told.items()}
    return {"bits": float(quantizer.selected_width), **numbers} if len(quantizer.widths) > 1 else numbers


def _share(of: NDArray[np.bool_]) -> float:
    return float(np.mean(of)) if of.size else 0.0
