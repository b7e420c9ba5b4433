# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 3 backend as the conformance kit sees it, on whatever engine Keras runs."""

from __future__ import annotations

import functools
import io
from typing import Any

import keras
import numpy as np
from keras import ops

from trainable_core.conformance.adapter import Run
from trainable_keras.conformance import Array, KerasAdapter
from trainable_keras.keras3.engine import ENGINE
from trainable_keras.keras3.framework import FRAMEWORK
from trainable_keras.keras3.pullback import pull_back


class Keras3Adapter(KerasAdapter):
    """See `trainable_core.conformance.adapter.Adapter`; Keras places tensors itself: the kit sees one device."""

    counts_calls = True
    dtypes = ("float32", "float16", "bfloat16") if ENGINE == "jax" else ("float32", "float16", "bfloat16", "float64")
    devices, modules = ("default",), ("keras", ENGINE, "mct_quantizers")

    def run(self, quantizer: Any, x: Array, *, training: bool, dtype: str, device: str, upstream: Array | None) -> Run:
        given, call = ops.cast(ops.convert_to_tensor(x), dtype), functools.partial(quantizer, training=training)
        trained = {} if upstream is None else self.trained(quantizer)
        output, *found = (call(given), None) if upstream is None else pull_back(call, given, trained, upstream)
        d_x, *d_variables = (None if each is None else self.to_array(each) for each in found)
        zeros = {name: np.zeros(variable.shape, np.float32) for name, variable in trained.items()}
        given_to = {name: d for name, d in zip(trained, d_variables, strict=True) if d is not None}
        dtype = keras.backend.standardize_dtype(output.dtype)
        return Run(self.to_array(output), dtype, device, self.to_array(given), d_x, {**zeros, **given_to})

    def save(self, quantizer: Any) -> bytes:
        store: dict[str, Any] = {}
        quantizer.save_own_variables(store)
        np.savez(buffer := io.BytesIO(), **store)
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.load_own_variables(dict(np.load(io.BytesIO(state))))


ADAPTER = Keras3Adapter(FRAMEWORK)
