"""Forward and backward of one fake quantization in Keras, as a multiple of copying the input and the gradient once.

Ours beside TensorFlow's fused ``fake_quant`` operators, and beside what Keras itself offers: a straight-through
expression of its operations, and on Keras 3 ``keras.quantizers.fake_quant_with_min_max_vars``. Theirs learn the ends of
the range where ours learn a threshold.

Usage: ``python benchmarks/keras_kernels.py [--rounds N] [--write]``
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from keras_measuring import MODES, PACKAGE, PART, VERSION, arguments, compiled, conditions
from measuring import interleaved, report, table

from trainable_core import QuantizationMethod, TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD

ACTIVATIONS = [(16, 28, 28, 256), (8, 512, 768)]
WEIGHTS = [(3, 3, 512, 512), (768, 3072)]
BITS = (4, 8)
METHODS = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO, QuantizationMethod.UNIFORM)
OTHERS = ("TensorFlow's fused", "Keras's operations", "Keras's quantizers")


@dataclass(frozen=True)
class Column:
    """What a column measures: the tensor, whether the grid learns, whether each channel has its own."""

    target: str
    learned: bool
    per_channel: bool

    def __str__(self) -> str:
        """Return the column's heading."""
        return f"{self.target} {'LSQ' if self.learned else 'STE'} {'channel' if self.per_channel else 'tensor'}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return what is quantized."""
        return ACTIVATIONS if self.target == "act" else WEIGHTS


COLUMNS = [
    Column("act", learned=False, per_channel=False),
    Column("act", learned=True, per_channel=False),
    *(Column("weight", learned, per_channel) for learned in (False, True) for per_channel in (False, True)),
]


def numbers(value: float, shape: tuple[int, ...], column: Column) -> Any:
    """Return a threshold or an end of a range, or one for each channel, the last axis."""
    channels = shape[-1]
    return [value * (1 + 0.1 * i / channels) for i in range(channels)] if column.per_channel else value


def quantizer(column: Column, method: QuantizationMethod, n_bits: int, shape: tuple[int, ...]) -> Any:
    """Return an initialized quantizer that clips a few per cent of normal numbers."""
    number = functools.partial(numbers, shape=shape, column=column)
    uniform = method is QuantizationMethod.UNIFORM
    params = {RANGE_MIN: number(-1.9), RANGE_MAX: number(2.2)} if uniform else {THRESHOLD: number(2.0)}
    if column.target == "act":
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
            weights_per_channel_threshold=column.per_channel,
            weights_channels_axis=len(shape) - 1 if column.per_channel else None,
        )
    name = f"{'Lsq' if column.learned else 'Ste'}{'Activation' if column.target == 'act' else 'Weights'}Quantizer"
    made = getattr(PACKAGE.quantizers, name)(config)
    made.initialize_quantization(shape, "x", None)
    return made


def fused(ends: tuple[Any, Any], n_bits: int, column: Column) -> Callable[[Any], Any]:
    """Return TensorFlow's own operator."""
    if column.per_channel:
        return lambda x: tf.quantization.fake_quant_with_min_max_vars_per_channel(x, *ends, num_bits=n_bits)
    return lambda x: tf.quantization.fake_quant_with_min_max_vars(x, *ends, num_bits=n_bits)


def operations(ends: tuple[Any, Any], n_bits: int, column: Column) -> Callable[[Any], Any]:
    """Return the straight-through expression that is written with Keras's operations."""
    del column  # channels are the last axis, to which numbers broadcast
    if VERSION.startswith("2."):
        clip, rounded, stop = tf.clip_by_value, tf.round, tf.stop_gradient
    else:
        clip, rounded, stop = tf.keras.ops.clip, tf.keras.ops.round, tf.keras.ops.stop_gradient

    def straight_through(x: Any) -> Any:
        scale = (ends[1] - ends[0]) / (2**n_bits - 1)
        low = rounded(ends[0] / scale)
        steps = clip(x / scale, stop(low), stop(low + (2**n_bits - 1)))
        return (steps + stop(rounded(steps) - steps)) * scale

    return straight_through


def keras_own(ends: tuple[Any, Any], n_bits: int, column: Column) -> Callable[[Any], Any]:
    """Return Keras 3's own function; it takes plain numbers or tensors."""
    axis = -1 if column.per_channel else None
    call = tf.keras.quantizers.fake_quant_with_min_max_vars
    return lambda x: call(x, *ends, num_bits=n_bits, axis=axis)


def candidates(column: Column, n_bits: int, shape: tuple[int, ...]) -> Iterator[tuple[str, Any, list[Any]]]:
    """Yield each candidate's name, function and variables to differentiate by."""
    for method in METHODS:
        made = quantizer(column, method, n_bits, shape)
        variables = [v if isinstance(v, tf.Variable) else v.value for v in made.trainable_variables]
        yield method.name, functools.partial(made, training=True), variables
    made_of = {OTHERS[0]: fused, OTHERS[1]: operations}
    if not VERSION.startswith("2."):
        made_of[OTHERS[2]] = keras_own
    for name, make in made_of.items():
        ends = tuple(tf.Variable(numbers(value, shape, column), trainable=column.learned) for value in (-2.0, 1.9))
        yield name, make(ends, n_bits, column), [*ends] if column.learned else []


def step(function: Any, variables: list[Any], x: Any, upstream: Any, mode: str) -> Callable[[], Any]:
    """Return forward and backward of a function; what it gives is dropped."""

    def both(x: Any, upstream: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = function(x)
        return output, tape.gradient(output, [x, *variables], output_gradients=upstream)

    run = compiled(both, mode)
    return lambda: run(x, upstream)


def floor(x: Any, upstream: Any) -> Callable[[], Any]:
    """Return the copies of input and gradient that no fake quantization can do without."""
    return lambda: (tf.raw_ops.DeepCopy(x=x), tf.raw_ops.DeepCopy(x=upstream))


def measured(column: Column, rounds: int) -> dict[tuple[str, str], float]:
    """Return the median of each way to run and candidate."""
    found: dict[tuple[str, str], list[float]] = {}
    for shape in column.shapes:
        x, upstream = tf.random.normal(shape), tf.random.normal(shape)
        for n_bits in BITS:
            for mode in MODES:
                made = candidates(column, n_bits, shape)
                runs = {name: step(function, variables, x, upstream, mode) for name, function, variables in made}
                for name, ratio in interleaved(floor(x, upstream), runs, rounds).items():
                    found.setdefault((mode, name), []).append(ratio)
    return {key: statistics.median(ratios) for key, ratios in found.items()}


def main() -> None:
    """Print six columns, with a row for every way to run and candidate."""
    options = arguments(__doc__ or "", rounds=7)
    columns = [measured(column, options.rounds) for column in COLUMNS]
    rows = [[*key, *(column[key] for column in columns)] for key in columns[0]]
    text = f"{conditions()}; medians over {len(ACTIVATIONS)} shapes, {BITS} bits, {options.rounds} rounds.\n\n"
    report(f"{PART} kernels", text + table(["", "", *map(str, COLUMNS)], rows), write=options.write)


if __name__ == "__main__":
    main()
