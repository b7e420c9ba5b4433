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
from typing import Any

import tensorflow as tf
from columns import BITS, COLUMNS, METHODS, Column
from keras_measuring import BACKEND, MODES, PART, VERSION, arguments, compiled, conditions
from measuring import interleaved, report, table

SHAPES = {"act": [(16, 28, 28, 256), (8, 512, 768)], "weight": [(3, 3, 512, 512), (768, 3072)]}
CHANNELS = -1
"""The axis of a weight's output channels."""
OTHERS = ("TensorFlow's fused", "Keras's operations", "Keras's quantizers")


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
        made = column.quantizer(BACKEND, method, n_bits, shape, len(shape) + CHANNELS)
        variables = [v if isinstance(v, tf.Variable) else v.value for v in made.trainable_variables]
        yield method.name, functools.partial(made, training=True), variables
    made_of = {OTHERS[0]: fused, OTHERS[1]: operations}
    if not VERSION.startswith("2."):
        made_of[OTHERS[2]] = keras_own
    for name, make in made_of.items():
        ends = tuple(
            tf.Variable(column.numbers(value, shape, CHANNELS), trainable=column.learned) for value in (-2.0, 1.9)
        )
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
    for shape in SHAPES[column.target]:
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
    text = f"{conditions()}; medians over {len(SHAPES['act'])} shapes, {BITS} bits, {options.rounds} rounds.\n\n"
    report("keras_kernels", PART, text + table(["", "", *map(str, COLUMNS)], rows), write=options.write)


if __name__ == "__main__":
    main()
