# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 2 backend as the conformance kit sees it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainable_core.conformance.adapter import Run
from trainable_core.enums import TieRule
from trainable_keras.keras2.engine import Tensor, keras, short_name, to_numpy

Array = NDArray[Any]


def to_array(x: Tensor) -> Array:
    """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
    return to_numpy(tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x)


class KerasAdapter:
    """See `trainable_core.conformance.adapter.Adapter`."""

    backend, tie_rule, counts_calls, subnormals = "tf_keras", TieRule.HALF_UP, False, False
    dtypes = ("float32", "float16", "bfloat16", "float64")
    devices = ("CPU", "GPU") if tf.config.list_physical_devices("GPU") else ("CPU",)
    modules = ("tensorflow", "mct_quantizers")

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
        (quantizer := cls(config, **arguments)).initialize_quantization(shape, "tensor", None)
        return quantizer

    def run(self, quantizer: Any, x: Array, *, training: bool, dtype: str, device: str, upstream: Array | None) -> Run:
        with tf.device(device), tf.GradientTape() as tape:
            tape.watch(given := tf.cast(tf.constant(x), dtype))
            output = quantizer(given, training)
        d_x, variables = None, {}
        if upstream is not None:
            trained, up = self.trained(quantizer), tf.cast(tf.constant(upstream), output.dtype)
            zero = tf.UnconnectedGradients.ZERO
            d_x, *found = tape.gradient(output, [given, *trained.values()], up, unconnected_gradients=zero)
            variables = {name: to_array(each) for name, each in zip(trained, found, strict=True)}
        d_x = None if d_x is None else to_array(d_x)
        where = output.device.rpartition("device:")[2].partition(":")[0]
        return Run(to_array(output), output.dtype.name, where, to_array(given), d_x, variables)

    def deploy(self, quantizer: Any, x: Array) -> Array:
        return to_array(quantizer.convert2inferable()(tf.constant(x)))

    def trained(self, quantizer: Any) -> dict[str, Any]:
        return {short_name(variable): variable for variable in quantizer.trainable_variables}

    def descend(self, quantizer: Any, gradients: Mapping[str, Array]) -> None:
        for name in (trained := self.trained(quantizer)).keys() & gradients.keys():
            trained[name].assign_sub(gradients[name])

    def copy(self, quantizer: Any) -> Any:
        return copy.deepcopy(quantizer)

    def save(self, quantizer: Any) -> bytes:
        np.savez(buffer := io.BytesIO(), *quantizer.get_weights())
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.set_weights(list(np.load(io.BytesIO(state)).values()))

    def model(self) -> tuple[Any, Any, Callable[[Any], Array]]:
        batch = tf.reshape(tf.linspace(-1.0, 1.0, 12), (4, 3))
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
        return model, batch, lambda model: to_array(model(batch, training=False))


ADAPTER = KerasAdapter()
