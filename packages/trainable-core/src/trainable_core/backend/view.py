"""A wrapped model as core looks at it: its quantized tensors, what they hold, and what passes through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.calibration.batches import check_batches, explained, feed
from trainable_core.granularity import Blocks
from trainable_core.qparams import Float32, QParams
from trainable_core.quantizer import BaseTrainableQuantizer

See = Callable[[NDArray[Any]], None]
"""What is given the values of an activation, once for each call of its holder."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A place where a model quantizes.

    Parameters
    ----------
    layer, tensor : str
        As `describe` names them.
    quantizer : object
        Trainable or inferable.
    weight : object
        How the backend finds the float weight; None of an activation.
    holder : object
        The holder of an activation; None of a weight.
    """

    layer: str
    tensor: str
    quantizer: Any
    weight: Any = None
    holder: Any = None

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight."""
        return self.holder is None

    @property
    def name(self) -> str:
        """The name in files: ``fc.weight``, or ``fc: output``."""
        return f"{self.layer}.{self.tensor}" if self.is_weight else f"{self.layer}: {self.tensor}"

    @property
    def grid(self) -> QParams | None:
        """The grid as it is now; None where there is none: not calibrated, switched off, computed from each tensor."""
        quantizer = self.quantizer
        if not isinstance(quantizer, BaseTrainableQuantizer):
            found: QParams | None = getattr(quantizer, "qparams", None)
            return found
        ready = quantizer.quantization_config.enabled and quantizer.calibrated and not quantizer.computes_grid
        return quantizer.deployed_qparams() if ready and quantizer.variable_names else None

    @property
    def blocks(self) -> Blocks | None:
        """What shares a scale where it is finer than channels."""
        if isinstance(self.quantizer, BaseTrainableQuantizer):
            return self.quantizer.quantization_config.blocks
        return getattr(self.quantizer, "blocks", None)

    @property
    def clips(self) -> bool:
        """Whether the values themselves are held against the grid's ends, and not what a method makes of them first."""
        return getattr(self.quantizer, "depends_on", "element") == "element"


class ModelView(ABC):
    """One wrapped or finalized model; a backend writes what only its framework can do.

    Parameters
    ----------
    model : model
        What `wrap` or `finalize` returned.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> list[QuantizedTensor]:
        """Return the model's quantized tensors, in the order of `describe`."""

    @abstractmethod
    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values as they are now; that they are read changes nothing in the model."""

    @abstractmethod
    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""

    @abstractmethod
    def seeing(self, seen: Mapping[Any, See]) -> AbstractContextManager[None]:
        """Show what reaches some holders while the model runs as it is deployed: quantized, without gradients.

        Afterwards, also after an error, everything is as it was: modes, buffers, counters and the random state.
        """

    @abstractmethod
    def call(self, batch: Any) -> Any:
        """Call the model with a batch as `calibrate` takes it."""

    @abstractmethod
    def is_tensor(self, batches: Any) -> bool:
        """Return whether `batches` is itself a tensor."""

    @abstractmethod
    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that the model has, by name."""

    # ---- what is the same in every backend --------------------------------------------------------------------------

    def check_batches(self, batches: Any, forward: object, subject: str) -> None:
        """Raise CalibrationError when `batches` are none, or `forward` is not callable."""
        check_batches(batches, forward, 1, single=self.is_tensor(batches), subject=subject)

    def look(
        self, batches: Iterable[Any], forward: Callable[[Any, Any], Any] | None, seen: Mapping[Any, See], subject: str
    ) -> None:
        """Call the model with the batches, and show what reaches some holders.

        Raises
        ------
        CalibrationError
            When there is no batch.
        """

        def call(batch: Any) -> Any:
            return explained(batch, lambda: self.call(batch)) if forward is None else forward(self.model, batch)

        with self.seeing(seen):
            feed(batches, call, subject)


def scale_of_elements(grid: QParams, shape: tuple[int, ...], places: NDArray[np.int64]) -> QParams:
    """Return the grid of single elements of a tensor, one after the other, along axis 0.

    Parameters
    ----------
    grid : QParams
        Of the tensor, per tensor or per channel.
    shape : tuple of int
        The tensor's.
    places : int64 array, shape (K,)
        Positions in the flattened tensor.

    Examples
    --------
    >>> grid = QParams(np.float32([1.0, 2.0]), np.int32([0, 0]), -8, 7, channels_axis=0)
    >>> scale_of_elements(grid, (2, 3), np.array([0, 2, 3])).scale
    array([1., 1., 2.], dtype=float32)
    """
    if grid.channels_axis is None:
        return grid
    axis = grid.channels_axis % len(shape)
    channel = places // int(np.prod(shape[axis + 1 :], dtype=np.int64)) % shape[axis]
    return QParams(grid.scale[channel], grid.zero_point[channel], grid.quant_min, grid.quant_max, 0, grid.levels)
