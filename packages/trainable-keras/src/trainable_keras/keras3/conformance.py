# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 3 backend as the conformance kit sees it, on whatever engine Keras runs."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from keras import ops

from trainable_core.conformance.adapter import INPUT, PLAIN, Call, Run, Way
from trainable_keras.conformance import Array, KerasAdapter, graph_shape
from trainable_keras.keras3 import graphs
from trainable_keras.keras3.engine import ENGINE
from trainable_keras.keras3.framework import FRAMEWORK
from trainable_keras.keras3.pullback import pull_back


class Keras3Adapter(KerasAdapter):
    """See `trainable_core.conformance.adapter.Adapter`; Keras places tensors itself: the kit sees one device."""

    counts_calls = True
    compiles_shapes = ENGINE == "jax"
    rounds_alike = ENGINE != "jax"
    cases = 18 if ENGINE == "jax" else KerasAdapter.cases  # JAX traces every gradient anew
    dtypes = ("float32", "float16", "bfloat16") if ENGINE == "jax" else ("float32", "float16", "bfloat16", "float64")
    devices, modules = ("default",), ("keras", ENGINE, "mct_quantizers")

    modes, thorough_modes = graphs.MODES, graphs.THOROUGH_MODES

    def tensor(self, x: Array, dtype: str) -> Any:
        return ops.cast(ops.convert_to_tensor(x), dtype)

    def dtype_name(self, tensor: Any) -> str:
        return str(keras.backend.standardize_dtype(tensor.dtype))

    def run(
        self,
        quantizer: Any,
        x: Array,
        *,
        training: bool,
        dtype: str,
        device: str,
        upstream: Array | None,
        way: Way = PLAIN,
    ) -> Run:
        given = self.tensor(x, dtype)
        call = functools.partial(quantizer, training=training) if way.explicit else quantizer
        trained = {} if upstream is None else self.trained(quantizer)
        if upstream is None:
            output, *found = call(given), None
        elif way.input_gradient:
            output, *found = pull_back(call, given, trained, upstream)
            found[0] = ops.zeros_like(given) if found[0] is None else found[0]
        else:
            output, _, *others = pull_back(lambda _: call(given), ops.zeros(()), trained, upstream)
            found = [None, *others]
        return self._run(given, output, found, trained, device)

    def _run(self, given: Any, output: Any, found: list[Any], trained: Mapping[str, Any], device: str) -> Run:
        d_x, *d_variables = (None if each is None else self.to_array(each) for each in found)
        zeros = {name: np.zeros(variable.shape, np.float32) for name, variable in trained.items()}
        given_to = {name: d for name, d in zip(trained, d_variables, strict=True) if d is not None}
        name = self.dtype_name(output)
        return Run(self.to_array(output), name, device, self.to_array(given), d_x, {**zeros, **given_to})

    def interleave(self, quantizer: Any, calls: Sequence[Call], order: Sequence[int]) -> list[Run]:
        trained = self.trained(quantizer)
        found = graphs.interleave(functools.partial(quantizer, training=True), calls, order, trained)
        return [
            self._run(self.tensor(x, "float32"), output, rest, trained, self.devices[0])
            for (output, *rest), (x, _) in zip(found, calls, strict=True)
        ]

    def execute(self, quantizer: Any, x: Array, mode: str, *, training: bool, upstream: Array | None) -> Run:
        trained = {} if upstream is None else self.trained(quantizer)
        call = functools.partial(quantizer, training=training)
        shape = graph_shape(quantizer, x, mode)
        output, *found = graphs.execute(call, x, mode, trained, upstream, shape)
        return self._run(x, output, found, trained, self.devices[0])

    def differentiated(
        self, call: Callable[[Any], Any], given: Any, variables: Mapping[str, Any], upstream: Array | None
    ) -> list[Any]:
        return [call(given)] if upstream is None else pull_back(call, given, variables, upstream)

    def second_derivative(
        self, quantizer: Any, x: Array, upstream: Array, directions: Mapping[str, Array]
    ) -> tuple[Run, Array] | None:
        trained, call = self.trained(quantizer), functools.partial(quantizer, training=True)
        several = [directions.get(name) for name in (INPUT, *trained)]
        found = graphs.second_derivative(call, x, trained, upstream, several)
        if found is None:
            return None
        output, *gradients = found[0]
        return self._run(x, output, gradients, trained, self.devices[0]), self.to_array(found[1])

    def regularization(self, quantizer: Any) -> tuple[float, dict[str, Array]] | None:
        found = self._term(quantizer, lambda _: quantizer.regularization(), np.zeros((), np.float32))
        if found is not None:
            del found[1][INPUT]
        return found

    def regularization_of(self, quantizer: Any, x: Array) -> tuple[float, dict[str, Array]] | None:
        return self._term(quantizer, quantizer.regularization_of, x)

    def _term(self, quantizer: Any, ask: Callable[[Any], Any], x: Array) -> tuple[float, dict[str, Array]] | None:
        given, trained = self.tensor(x, "float32"), self.trained(quantizer)
        term = ask(given)
        if term is None:
            return None
        _, *found = pull_back(ask, given, trained, np.float32(1))
        zeros = [np.zeros(tuple(each.shape), np.float32) for each in (given, *trained.values())]
        values = [zero if each is None else self.to_array(each) for each, zero in zip(found, zeros, strict=True)]
        return float(self.to_array(term)), dict(zip((INPUT, *trained), values, strict=True))

    def random_states(self) -> dict[str, bytes]:
        return graphs.random_states()

    def other_random_state(self, seed: int | None = None) -> AbstractContextManager[None]:
        return graphs.other_random_state(seed)

    def save(self, quantizer: Any) -> bytes:
        store: dict[str, Any] = {}
        quantizer.save_own_variables(store)
        np.savez(buffer := io.BytesIO(), **store)
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.load_own_variables(dict(np.load(io.BytesIO(state))))


ADAPTER = Keras3Adapter(FRAMEWORK)
