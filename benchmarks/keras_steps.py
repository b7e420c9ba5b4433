"""A whole training step of a quantized Keras model, as a ratio to the float model: in a graph, and compiled by XLA.

Forward, backward and SGD; all layers quantized, batch norm kept. Runs on Keras 3 and on Keras 2, whichever is there.

Usage: ``python benchmarks/keras_steps.py [--rounds N] [--write]``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras_measuring import MODES, PART, arguments, compiled, conditions
from keras_models import cases
from measuring import interleaved, report, table
from recipes import recipe

import trainable_keras

LIMITS = {("LSQ", "graph"): "1.20", ("LSQ", "XLA"): "1.15"}
RATE = 1e-4


def training_step(model: Any, x: Any, mode: str) -> Callable[[], Any]:
    """Return forward, backward and a step of SGD."""
    variables = [v if isinstance(v, tf.Variable) else v.value for v in model.trainable_variables]  # of Keras 3

    def step(batch: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(batch, training=True)))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(RATE * gradient)
        return loss

    run = compiled(step, mode)
    return lambda: run(x)


def quantized(model: Any, x: Any, training_method: str, weight_bits: int) -> Any:
    """Return a wrapped and calibrated copy of a model."""
    return trainable_keras.calibrate(trainable_keras.wrap(model, recipe(training_method, weight_bits)), [x])


def main() -> None:
    """Print one row per model and quantization."""
    options = arguments(__doc__ or "", rounds=15)
    rows = []
    for name, (model, x) in cases().items():
        models = {(method, bits): quantized(model, x, method, bits) for method in ("STE", "LSQ") for bits in (8, 4)}
        ratios = {}
        for mode in MODES[1:]:
            steps = {how: training_step(each, x, mode) for how, each in models.items()}
            ratios[mode] = interleaved(training_step(model, x, mode), steps, options.rounds)
        for method, bits in models:
            cells = [(ratios[mode][method, bits], LIMITS.get((method, mode), "-")) for mode in MODES[1:]]
            rows.append([name, f"{method} W{bits}A8", *(cell for pair in cells for cell in pair)])
    header = ["model", "quantization", "graph / float", "target", "XLA / float", "target"]
    text = f"{conditions()}; medians of {options.rounds} rounds.\n\n"
    report("keras_steps", PART, text + table(header, rows), write=options.write)


if __name__ == "__main__":
    main()
