# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 2 backend as the conformance kit sees it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import tensorflow as tf

from trainable_core.conformance.adapter import Run
from trainable_keras.conformance import Array, KerasAdapter
from trainable_keras.keras2.framework import FRAMEWORK


class Keras2Adapter(KerasAdapter):
    """See `trainable_core.conformance.adapter.Adapter`."""

    counts_calls = False
    dtypes = ("float32", "float16", "bfloat16", "float64")
    devices = ("CPU", "GPU") if tf.config.list_physical_devices("GPU") else ("CPU",)
    modules = ("tensorflow", "mct_quantizers")

    def run(self, quantizer: Any, x: Array, *, training: bool, dtype: str, device: str, upstream: Array | None) -> Run:
        with tf.device(device), tf.GradientTape() as tape:
            tape.watch(given := tf.cast(tf.constant(x), dtype))
            output = quantizer(given, training)
        d_x, variables = None, {}
        if upstream is not None:
            trained, up = self.trained(quantizer), tf.cast(tf.constant(upstream), output.dtype)
            zero = tf.UnconnectedGradients.ZERO
            d_x, *found = tape.gradient(output, [given, *trained.values()], up, unconnected_gradients=zero)
            variables = {name: self.to_array(each) for name, each in zip(trained, found, strict=True)}
        d_x = None if d_x is None else self.to_array(d_x)
        where = output.device.rpartition("device:")[2].partition(":")[0]
        return Run(self.to_array(output), output.dtype.name, where, self.to_array(given), d_x, variables)

    def save(self, quantizer: Any) -> bytes:
        np.savez(buffer := io.BytesIO(), *quantizer.get_weights())
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.set_weights(list(np.load(io.BytesIO(state)).values()))


ADAPTER = Keras2Adapter(FRAMEWORK)
