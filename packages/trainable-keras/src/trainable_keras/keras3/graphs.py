# ruff: noqa: PLC0415 - only the engine that Keras runs on has to be installed
"""Calls in a graph or compiled, and differentiated twice, on whatever engine Keras runs: for the conformance kit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from trainable_keras.conformance import GRAPH, UNKNOWN_SIZES
from trainable_keras.keras3.engine import ENGINE, Tensor
from trainable_keras.keras3.pullback import pull_back

Array = NDArray[Any]

MODES: Mapping[str, bool] = {"tensorflow": {GRAPH: True, UNKNOWN_SIZES: True}, "jax": {"jit": False}}.get(ENGINE, {})
"""Ways to run a call, and whether each gives the bits of the eager call; see the conformance kit's `Adapter`."""
THOROUGH_MODES: Mapping[str, bool] = {"XLA": False} if ENGINE == "tensorflow" else {}


def execute(
    call: Callable[[Tensor], Tensor],
    x: Array,
    mode: str,
    variables: Mapping[str, keras.Variable],
    upstream: Array | None,
    shape: tuple[int | None, ...],
) -> list[Any]:
    """Return what `pull_back` returns, computed in one of `MODES`; without `upstream` the output and None.

    A graph of TensorFlow's knows the `shape` of its input, and no more.
    """
    missing: list[bool] = []

    def step(given: Tensor) -> list[Tensor]:
        if upstream is None:
            found = [call(given), None]
        else:
            up = ops.reshape(ops.convert_to_tensor(upstream), ops.shape(given))
            found = pull_back(call, given, variables, up)
        missing[:] = [each is None for each in found]
        return [each for each in found if each is not None]

    if ENGINE == "tensorflow":
        import tensorflow as tf

        signature = [tf.TensorSpec(shape, tf.float32)]
        compiled = tf.function(
            step, input_signature=signature, jit_compile=mode == "XLA", autograph=False
        )  # as `fit` does
        results = iter(compiled(tf.constant(x)))
    else:
        import jax

        def stateless(given: Tensor) -> list[Tensor]:
            with keras.StatelessScope():  # what is assigned inside would be a tracer outside
                return step(given)

        results = iter(jax.jit(stateless)(x))
    return [None if gone else next(results) for gone in missing]


def interleave(
    call: Callable[[Tensor], Tensor],
    calls: Sequence[tuple[Array, Array]],
    order: Sequence[int],
    variables: Mapping[str, keras.Variable],
) -> list[list[Any]]:
    """Return for each call what `pull_back` returns, where all are called before the first gradient is taken."""
    values, found = [variable.value for variable in variables.values()], {}
    if ENGINE == "tensorflow":
        import tensorflow as tf

        taken = []
        for x, upstream in calls:
            given = tf.constant(x)
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(given)
                output = call(given)
            taken.append((tape, given, output, tf.constant(upstream)))
        for index in order:
            tape, given, output, up = taken[index]
            found[index] = [output, *tape.gradient(output, [given, *values], up)]
    elif ENGINE == "jax":
        import jax

        def function(x: Tensor, values: list[Tensor]) -> Tensor:
            with keras.StatelessScope(list(zip(variables.values(), values, strict=True))):
                return call(x)

        pulled = [jax.vjp(function, jax.numpy.asarray(x), values) for x, _ in calls]
        for index in order:
            output, pull = pulled[index]
            d_x, d_values = pull(jax.numpy.asarray(calls[index][1]))
            found[index] = [output, d_x, *d_values]
    else:
        for index, (x, upstream) in enumerate(calls):
            found[index] = pull_back(call, ops.convert_to_tensor(x), variables, upstream)
    return [found[index] for index in range(len(calls))]


def second_derivative(
    call: Callable[[Tensor], Tensor],
    x: Array,
    variables: Mapping[str, keras.Variable],
    upstream: Array,
    directions: Sequence[Array | None],
) -> tuple[list[Any], Any] | None:
    """Return output and gradients, and the derivative of ``sum(direction * gradient)`` by the upstream gradient.

    The gradients are that of the input, then those of the variables; those without a direction don't count. None where
    nothing is connected.
    """
    values = [variable.value for variable in variables.values()]
    if ENGINE == "tensorflow":
        import tensorflow as tf

        given, up = tf.constant(x), tf.constant(upstream)
        with tf.GradientTape() as outer:
            outer.watch(up)
            with tf.GradientTape() as tape:
                tape.watch(given)
                output = call(given)
            found = tape.gradient(output, [given, *values], up)
        pairs = [
            (gradient, tf.constant(direction))
            for gradient, direction in zip(found, directions, strict=True)
            if gradient is not None and direction is not None
        ]
        second = outer.gradient([gradient for gradient, _ in pairs], up, [direction for _, direction in pairs])
        return None if second is None else ([output, *found], second)
    if ENGINE == "jax":
        import jax

        def function(given: Tensor, values: list[Tensor]) -> Tensor:
            with keras.StatelessScope(list(zip(variables.values(), values, strict=True))):
                return call(given)

        def gradients(up: Tensor) -> list[Tensor]:
            d_x, d_values = jax.vjp(function, jax.numpy.asarray(x), values)[1](up)
            return [d_x, *d_values]

        found, pull = jax.vjp(gradients, jax.numpy.asarray(upstream))
        filled = [
            jax.numpy.zeros_like(gradient) if direction is None else jax.numpy.asarray(direction)
            for gradient, direction in zip(found, directions, strict=True)
        ]
        with keras.StatelessScope():
            output = call(jax.numpy.asarray(x))
        return [output, *found], pull(filled)[0]
    return None


def random_states() -> dict[str, bytes]:
    """Return the state of the seed generator that ``keras.random`` takes when it is given none."""
    try:
        from keras.src.backend.common import global_state
    except ImportError:  # not part of Keras's public API
        return {}
    generator = global_state.get_global_attribute("global_seed_generator")
    return {"keras.random": b"" if generator is None else np.asarray(ops.convert_to_numpy(generator.state)).tobytes()}


@contextmanager
def other_random_state(seed: int | None) -> Iterator[None]:
    """Give the generator of `random_states` a state that nobody has seen before, or a seed's, and put its own back.

    A generator that isn't there yet is made first: it takes its seed from Python's random numbers.
    """
    try:
        from keras.src.random.seed_generator import global_seed_generator
    except ImportError:  # as above
        yield
        return
    state = global_seed_generator().state
    own = np.array(ops.convert_to_numpy(state))
    unseen = np.frombuffer(os.urandom(4 * own.size), np.uint32) >> 1  # within int32, too
    if seed is not None:
        unseen = np.arange(own.size) + seed
        if ENGINE == "tensorflow":
            import tensorflow as tf

            tf.random.set_seed(seed)  # as `keras.utils.set_random_seed` does
    state.assign(unseen.reshape(own.shape).astype(own.dtype))
    try:
        yield
    finally:
        state.assign(own)
