# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 3 backend as the conformance kit sees it, on whatever engine Keras runs."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from trainable_core.conformance.adapter import Run
from trainable_core.enums import TieRule
from trainable_keras.keras3.engine import ENGINE, Tensor, to_numpy
from trainable_keras.keras3.pullback import pull_back

Array = NDArray[Any]


def to_array(x: Tensor) -> Array:
    """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
    return np.array(to_numpy(ops.cast(x, "float32") if keras.backend.standardize_dtype(x.dtype) == "bfloat16" else x))


class KerasAdapter:
    """See `trainable_core.conformance.adapter.Adapter`; Keras places tensors itself: the kit sees one device."""

    backend, tie_rule, counts_calls, subnormals = "keras", TieRule.HALF_UP, True, False
    dtypes = ("float32", "float16", "bfloat16") if ENGINE == "jax" else ("float32", "float16", "bfloat16", "float64")
    devices, modules = ("default",), ("keras", ENGINE, "mct_quantizers")

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
        (quantizer := cls(config, **arguments)).initialize_quantization(shape, "tensor", None)
        return quantizer

    def run(self, quantizer: Any, x: Array, *, training: bool, dtype: str, device: str, upstream: Array | None) -> Run:
        given, call = ops.cast(ops.convert_to_tensor(x), dtype), functools.partial(quantizer, training=training)
        trained = {} if upstream is None else self.trained(quantizer)
        output, *found = (call(given), None) if upstream is None else pull_back(call, given, trained, upstream)
        d_x, *d_variables = (None if each is None else to_array(each) for each in found)
        zeros = {name: np.zeros(variable.shape, np.float32) for name, variable in trained.items()}
        given_to = {name: d for name, d in zip(trained, d_variables, strict=True) if d is not None}
        dtype = keras.backend.standardize_dtype(output.dtype)
        return Run(to_array(output), dtype, device, to_array(given), d_x, {**zeros, **given_to})

    def deploy(self, quantizer: Any, x: Array) -> Array:
        return to_array(quantizer.convert2inferable()(ops.convert_to_tensor(x)))

    def trained(self, quantizer: Any) -> dict[str, keras.Variable]:
        return {variable.name: variable for variable in quantizer.trainable_variables}

    def descend(self, quantizer: Any, gradients: Mapping[str, Array]) -> None:
        for name in (trained := self.trained(quantizer)).keys() & gradients.keys():
            trained[name].assign_sub(ops.convert_to_tensor(gradients[name]))

    def copy(self, quantizer: Any) -> Any:
        return copy.deepcopy(quantizer)

    def save(self, quantizer: Any) -> bytes:
        store: dict[str, Any] = {}
        quantizer.save_own_variables(store)
        np.savez(buffer := io.BytesIO(), **store)
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.load_own_variables(dict(np.load(io.BytesIO(state))))

    def model(self) -> tuple[keras.Model, Tensor, Callable[[keras.Model], Array]]:
        batch = ops.reshape(ops.linspace(-1.0, 1.0, 12), (4, 3))
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
        return model, batch, lambda model: to_array(model(batch, training=False))


ADAPTER = KerasAdapter()
