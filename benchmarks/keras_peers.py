"""One fake quantization by the ancestor's Keras quantizers beside ours: multiples of copying input and gradient once.

Run by ``nox -s bench_peers``, in an environment with TensorFlow 2.15; by hand, in such an environment:

Usage: ``python benchmarks/keras_peers.py --peer model-compression-toolkit [--rounds N]``
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import statistics
from typing import Any

import numpy as np
import tensorflow as tf
from columns import BITS, COLUMNS, Column
from keras_kernels import CHANNELS, SHAPES, floor, step
from keras_measuring import BACKEND, MODES, arguments, conditions
from measuring import interleaved, report, table

from trainable_core import QuantizationMethod

ROOT = "model_compression_toolkit"


def _mct(column: Column, n_bits: int, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """Return the ancestor's quantizer, and the variables that it learns."""
    common = importlib.import_module(f"{ROOT}.trainable_infrastructure.common.trainable_quantizer_config")
    method = importlib.import_module("mct_quantizers").QuantizationMethod.SYMMETRIC
    name, folder = ("LSQ", "lsq.symmetric_lsq") if column.learned else ("STE", "ste_rounding.symmetric_ste")
    if column.target == "act":
        folder = folder.replace("ste_rounding", "ste")
        module = f"{ROOT}.trainable_infrastructure.keras.activation_quantizers.{folder}"
        cls = getattr(importlib.import_module(module), f"{name}SymmetricActivationTrainableQuantizer")
        config = common.TrainableQuantizerActivationConfig(
            activation_quantization_method=method,
            activation_n_bits=n_bits,
            activation_quantization_params={"threshold": 2.0, "is_signed": True},
            enable_activation_quantization=True,
            min_threshold=2**-16,
        )
    else:
        cls = getattr(importlib.import_module(f"{ROOT}.qat.keras.quantizer.{folder}"), f"{name}WeightQATQuantizer")
        threshold = np.reshape(
            np.asarray(column.numbers(2.0, shape, CHANNELS), np.float32), [1] * (len(shape) - 1) + [-1]
        )
        config = common.TrainableQuantizerWeightsConfig(
            weights_quantization_method=method,
            weights_n_bits=n_bits,
            weights_quantization_params={"threshold": threshold},
            enable_weights_quantization=True,
            weights_channels_axis=len(shape) - 1,
            weights_per_channel_threshold=column.per_channel,
            min_threshold=2**-16,
        )
    layer = tf.keras.layers.Layer()
    made = cls(config)
    made.initialize_quantization(shape, "x", layer)
    return functools.partial(made, training=True), layer.trainable_variables


PEERS = {"model-compression-toolkit": _mct}


def measured(peer: str, column: Column, rounds: int) -> dict[tuple[str, str], float]:
    """Return the median of each way to run, ours and the peer's."""
    found: dict[tuple[str, str], list[float]] = {}
    for shape in SHAPES[column.target]:
        x, upstream = tf.random.normal(shape), tf.random.normal(shape)
        for n_bits in BITS:
            ours = column.quantizer(BACKEND, QuantizationMethod.SYMMETRIC, n_bits, shape, len(shape) + CHANNELS)
            made = {"ours": (functools.partial(ours, training=True), ours.trainable_variables)}
            made[peer] = PEERS[peer](column, n_bits, shape)
            for mode in MODES:
                runs = {who: step(*each, x, upstream, mode) for who, each in made.items()}
                for who, ratio in interleaved(floor(x, upstream), runs, rounds).items():
                    found.setdefault((mode, who), []).append(ratio)
    return {key: statistics.median(ratios) for key, ratios in found.items()}


def main() -> None:
    """Print two rows for every way to run: ours and the peer's."""
    options = arguments(__doc__ or "", rounds=7, peers=PEERS)
    peer: str = options.peer
    columns = [measured(peer, column, options.rounds) for column in COLUMNS]
    version = importlib.metadata.version(peer)
    rows = [
        [mode, who if who == "ours" else f"{who} {version}", *(column[mode, who] for column in columns)]
        for mode, who in columns[0]
    ]
    text = f"{conditions()}; medians of {options.rounds} rounds.\n\n"
    report("keras_peers", peer, text + table(["", "", *map(str, COLUMNS)], rows), write=options.write)


if __name__ == "__main__":
    main()
