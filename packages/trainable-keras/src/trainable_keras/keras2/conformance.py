# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""The Keras 2 backend as the conformance kit sees it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainable_core.conformance.adapter import INPUT, PLAIN, Call, Run, Way
from trainable_keras.conformance import GRAPH, UNKNOWN_SIZES, Array, KerasAdapter, graph_shape
from trainable_keras.keras2.framework import FRAMEWORK


class Keras2Adapter(KerasAdapter):
    """See `trainable_core.conformance.adapter.Adapter`."""

    counts_calls = False
    dtypes = ("float32", "float16", "bfloat16", "float64")
    devices = ("CPU", "GPU") if tf.config.list_physical_devices("GPU") else ("CPU",)
    modules = ("tensorflow", "mct_quantizers")

    modes: Mapping[str, bool] = {GRAPH: True, UNKNOWN_SIZES: True}
    thorough_modes: Mapping[str, bool] = {"XLA": False}

    def tensor(self, x: Array, dtype: str) -> Any:
        return tf.cast(tf.constant(x), dtype)

    def dtype_name(self, tensor: Any) -> str:
        return str(tensor.dtype.name)

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
        def call(given: Any) -> Any:
            return quantizer(given, training) if way.explicit else quantizer(given)

        with tf.device(device):
            given = self.tensor(x, dtype)
            found = gradients(call, given, self._learned(quantizer, upstream), upstream, way)
        where = found[0].device.rpartition("device:")[2].partition(":")[0]
        return self._run(quantizer, given, found, where, upstream)

    def _learned(self, quantizer: Any, upstream: Array | None) -> list[Any]:
        return [] if upstream is None else list(self.trained(quantizer).values())

    def _run(self, quantizer: Any, given: Any, found: Sequence[Any], where: str, upstream: Array | None) -> Run:
        output, d_x, *learned = found
        names = [] if upstream is None else list(self.trained(quantizer))
        variables = {name: self.to_array(each) for name, each in zip(names, learned, strict=True)}
        d_x = None if d_x is None else self.to_array(d_x)
        return Run(self.to_array(output), output.dtype.name, where, self.to_array(given), d_x, variables)

    def interleave(self, quantizer: Any, calls: Sequence[Call], order: Sequence[int]) -> list[Run]:
        taken, runs = [], {}
        learned = list(self.trained(quantizer).values())
        for x, upstream in calls:
            given = tf.constant(x)
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(given)
                output = quantizer(given, True)  # noqa: FBT003 - mctq's call
            taken.append((tape, given, output, upstream))
        for index in order:
            tape, given, output, upstream = taken[index]
            zero = tf.UnconnectedGradients.ZERO
            up = tf.constant(upstream)
            found = [output, *tape.gradient(output, [given, *learned], up, unconnected_gradients=zero)]
            runs[index] = self._run(quantizer, given, found, self.devices[0], upstream)
        return [runs[index] for index in range(len(calls))]

    def execute(self, quantizer: Any, x: Array, mode: str, *, training: bool, upstream: Array | None) -> Run:
        def call(given: Any) -> Any:
            return quantizer(given, training)

        def step(given: Any) -> list[Any]:
            found = gradients(call, given, self._learned(quantizer, upstream), upstream, PLAIN)
            return [each for each in found if each is not None]

        signature = [tf.TensorSpec(graph_shape(quantizer, x, mode), tf.float32)]
        compiled = tf.function(step, input_signature=signature, jit_compile=mode == "XLA")
        given = tf.constant(x)
        output, *rest = compiled(given)
        return self._run(quantizer, given, [output, *(rest or [None])], self.devices[0], upstream)

    def differentiated(
        self, call: Callable[[Any], Any], given: Any, variables: Mapping[str, Any], upstream: Array | None
    ) -> list[Any]:
        return gradients(call, given, list(variables.values()), upstream, PLAIN)

    def second_derivative(
        self, quantizer: Any, x: Array, upstream: Array, directions: Mapping[str, Array]
    ) -> tuple[Run, Array] | None:
        given, up, trained = tf.constant(x), tf.constant(upstream), self.trained(quantizer)
        with tf.GradientTape() as outer:
            outer.watch(up)
            with tf.GradientTape() as tape:
                tape.watch(given)
                output = quantizer(given, True)  # noqa: FBT003 - mctq's call
            zero = tf.UnconnectedGradients.ZERO
            found = tape.gradient(output, [given, *trained.values()], up, unconnected_gradients=zero)
        named = dict(zip((INPUT, *trained), found, strict=True))
        targets = [named[name] for name in directions]
        second = outer.gradient(targets, up, [tf.constant(each) for each in directions.values()])
        if second is None:
            return None
        return self._run(quantizer, given, [output, *found], self.devices[0], upstream), self.to_array(second)

    def regularization(self, quantizer: Any) -> tuple[float, dict[str, Array]] | None:
        found = self._term(quantizer, lambda _: quantizer.regularization(), np.zeros((), np.float32))
        if found is not None:
            del found[1][INPUT]
        return found

    def regularization_of(self, quantizer: Any, x: Array) -> tuple[float, dict[str, Array]] | None:
        return self._term(quantizer, quantizer.regularization_of, x)

    def _term(self, quantizer: Any, ask: Callable[[Any], Any], x: Array) -> tuple[float, dict[str, Array]] | None:
        given, trained = tf.constant(x), self.trained(quantizer)
        with tf.GradientTape() as tape:
            tape.watch(given)
            term = ask(given)
        if term is None:
            return None
        sources, zero = [given, *trained.values()], tf.UnconnectedGradients.ZERO
        found = tape.gradient(term, sources, unconnected_gradients=zero)
        return float(term), {n: self.to_array(each) for n, each in zip((INPUT, *trained), found, strict=True)}

    def save(self, quantizer: Any) -> bytes:
        np.savez(buffer := io.BytesIO(), *quantizer.get_weights())
        return buffer.getvalue()

    def restore(self, quantizer: Any, state: bytes) -> None:
        quantizer.set_weights(list(np.load(io.BytesIO(state)).values()))


def gradients(
    call: Callable[[Any], Any], given: Any, learned: Sequence[Any], upstream: Array | None, way: Way
) -> list[Any]:
    """Return the output, the input's gradient or None, and those of the variables."""
    with tf.GradientTape() as tape:
        if way.input_gradient:
            tape.watch(given)
        output = call(given)
    if upstream is None:
        return [output, None]
    zero = tf.UnconnectedGradients.ZERO
    up = tf.reshape(tf.cast(tf.constant(upstream), output.dtype), tf.shape(output))
    wanted = [given, *learned] if way.input_gradient else list(learned)
    found = list(tape.gradient(output, wanted, up, unconnected_gradients=zero)) if wanted else []
    return [output, *(found if way.input_gradient else [None, *found])]


ADAPTER = Keras2Adapter(FRAMEWORK)
