"""What the tables of single quantizers measure, in every framework: six columns, three grids, two widths.

A framework adds the shapes, whose channels lie on another axis, and how a function runs forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainable_core import (
    QuantizationMethod,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    get_trainable_quantizer_class,
)
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD

BITS = (4, 8)
METHODS = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Parameters
    ----------
    target : {'act', 'weight'}
        What is quantized.
    learned : bool
        Whether the grid learns (LSQ) or stays (STE).
    per_channel : bool
        Whether each channel has a grid of its own.
    aim : float
        The most that PyTorch's quantizer for a SYMMETRIC grid should cost, in copies of the input and the gradient.
    """

    target: Literal["act", "weight"]
    learned: bool
    per_channel: bool
    aim: float

    def __str__(self) -> str:
        """Return the column's heading."""
        return f"{self.target} {self.training_method} {'channel' if self.per_channel else 'tensor'}"

    @property
    def training_method(self) -> str:
        """The method's name."""
        return "LSQ" if self.learned else "STE"

    def numbers(self, value: float, shape: tuple[int, ...], axis: int) -> Any:
        """Return a threshold or an end of a range, or one for each channel, all of them different."""
        count = shape[axis]
        return [value * (1 + 0.1 * i / count) for i in range(count)] if self.per_channel else value

    def quantizer(
        self, backend: str, method: QuantizationMethod, n_bits: int, shape: tuple[int, ...], axis: int
    ) -> Any:
        """Return an initialized quantizer that clips a few per cent of normal numbers.

        Parameters
        ----------
        backend : str
            Whose quantizer.
        method : QuantizationMethod
            The kind of grid.
        n_bits : int
            Its width.
        shape : tuple of int
            The tensor's.
        axis : int
            Where the framework has the channels.
        """
        uniform = method is QuantizationMethod.UNIFORM
        ends = {RANGE_MIN: -1.9, RANGE_MAX: 2.2} if uniform else {THRESHOLD: 2.0}
        params = {name: self.numbers(value, shape, axis) for name, value in ends.items()}
        if self.target == "act":
            config: Any = TrainableQuantizerActivationConfig(
                activation_quantization_method=method,
                activation_n_bits=n_bits,
                activation_quantization_params=params if uniform else {**params, SIGNED: True},
            )
        else:
            config = TrainableQuantizerWeightsConfig(
                weights_quantization_method=method,
                weights_n_bits=n_bits,
                weights_quantization_params=params,
                weights_per_channel_threshold=self.per_channel,
                weights_channels_axis=axis if self.per_channel else None,
            )
        made = get_trainable_quantizer_class(config.target, self.training_method, method, backend=backend)(config)
        made.initialize_quantization(shape, "x", None)
        return made


COLUMNS = (
    Column("act", learned=False, per_channel=False, aim=2.0),
    Column("act", learned=True, per_channel=False, aim=4.0),
    Column("weight", learned=False, per_channel=False, aim=3.0),
    Column("weight", learned=False, per_channel=True, aim=4.0),
    Column("weight", learned=True, per_channel=False, aim=6.0),
    Column("weight", learned=True, per_channel=True, aim=8.0),
)
