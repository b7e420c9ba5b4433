# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""What both Kerases show the conformance kit in the same way; each Keras's adapter adds how a gradient is taken."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.adapter import BaseAdapter, Observed, Run, State, Way
from trainable_core.enums import TieRule
from trainable_keras.framework import Framework

Array = NDArray[Any]

GRAPH, UNKNOWN_SIZES = "graph", "graph of unknown sizes"
"""Modes of `Adapter.execute` that both Kerases have."""


def graph_shape(quantizer: Any, x: NDArray[Any], mode: str) -> tuple[int | None, ...]:
    """Return the shape that a graph knows of its input.

    Layers know the sizes of their weights, and their channels; the batch, and the images' sizes, may be unknown.
    """
    if mode != UNKNOWN_SIZES or not x.ndim or quantizer.quantization_config.prefix == "weights":
        return x.shape
    return (None,) if x.ndim == 1 else (*[None] * (x.ndim - 1), x.shape[-1])


def _is_symbolic(value: Any) -> bool:
    """Return whether a value is a tensor of a graph, or of a trace, of any of Keras's engines."""
    tensorflow, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    of_graph = tensorflow is not None and tensorflow.is_symbolic_tensor(value)
    return bool(of_graph or (jax is not None and isinstance(value, jax.core.Tracer)))


class KerasAdapter(BaseAdapter):
    """The part of a `trainable_core.conformance.adapter.Adapter` that is the same for both Kerases.

    Parameters
    ----------
    framework : Framework
        The Keras.
    """

    tie_rule, subnormals, blocks, modifiers = TieRule.HALF_UP, False, True, True
    replaceable = ("quantized", "fake_quantize", "grid")
    devices: tuple[str, ...]
    counts_calls: bool
    of_activations = (UNKNOWN_SIZES,)
    cases = 54  # an eager call takes milliseconds, and every shape is traced anew

    def __init__(self, framework: Framework) -> None:
        self.framework = framework
        self.backend = framework.backend

    def shown(self, quantizer: Any, x: Array) -> None:
        quantizer.observe(self.tensor(x, "float32"))

    def settings(self) -> dict[str, Any]:
        keras = self.framework.module
        found = {
            "the dtype policy": keras.mixed_precision.global_policy().name,
            "floatx": keras.backend.floatx(),
            "the image data format": keras.backend.image_data_format(),
        }
        tensorflow = sys.modules.get("tensorflow")
        if tensorflow is not None:
            found["whether functions run eagerly"] = tensorflow.config.functions_run_eagerly()
        return found

    def left_by_graphs(self, quantizer: Any) -> list[str]:
        return [name for name, value in vars(quantizer).items() if _is_symbolic(value)]

    def withhold(self, quantizer: Any) -> bool:
        quantizer.trainable = False
        return True

    @property
    def contexts(self) -> Mapping[str, Callable[[], AbstractContextManager[Any]]]:  # type: ignore[override]
        return {"the policy mixed_bfloat16": self._policy, "other defaults of the process": self._defaults}

    @contextmanager
    def _defaults(self) -> Iterator[None]:
        backend = self.framework.module.backend
        own = backend.floatx(), backend.image_data_format()
        backend.set_floatx("float16" if own[0] == "float32" else "float32")
        backend.set_image_data_format("channels_first" if own[1] == "channels_last" else "channels_last")
        try:
            yield
        finally:
            backend.set_floatx(own[0])
            backend.set_image_data_format(own[1])

    @contextmanager
    def _policy(self) -> Iterator[None]:
        precision = self.framework.module.mixed_precision
        own = precision.global_policy()
        precision.set_global_policy("mixed_bfloat16")
        try:
            yield
        finally:
            precision.set_global_policy(own)

    def to_array(self, x: Any) -> Array:
        """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
        array = self.framework.functions.to_numpy(x)
        return np.array(array, np.float32 if array.dtype.name == "bfloat16" else None)

    def tensor(self, x: Array, dtype: str) -> Any:
        """Return values as a tensor of a dtype."""
        raise NotImplementedError

    def dtype_name(self, tensor: Any) -> str:
        """Return the name of a tensor's dtype."""
        raise NotImplementedError

    def deployed(self, quantizer: Any) -> Callable[[Array, str, Way], Run]:
        inferable = quantizer.convert2inferable()

        def call(x: Array, dtype: str, way: Way) -> Run:  # noqa: ARG001 - tensors have one layout
            given = self.tensor(x, dtype)
            output = inferable(given)
            return Run(self.to_array(output), self.dtype_name(output), self.devices[0], self.to_array(given))

        return call

    def observe(self, quantizer: Any, x: Array, upstream: Array, *, training: bool) -> Observed:
        del upstream  # tensors can't be changed
        given = self.tensor(x, "float32")
        output = quantizer(given, training=training)
        held = {"the input": weakref.ref(given), "the output": weakref.ref(output)}
        del given, output
        if any(reference() is not None for reference in held.values()):
            gc.collect(1)  # what only a cycle holds is not kept; it is young
        return Observed(tuple(name for name, reference in held.items() if reference() is not None))

    def differentiated(
        self, call: Callable[[Any], Any], given: Any, variables: Mapping[str, Any], upstream: Array | None
    ) -> list[Any]:
        """Return the output, the input's gradient and those of the variables; without `upstream` the output alone."""
        raise NotImplementedError

    def in_a_layer(self, quantizer: Any, weights: Array) -> InDense:
        return InDense(self, quantizer, weights)

    def collected(self, quantizer: Any, x: Array, *, training: bool = True) -> list[float]:
        quantizer(self.tensor(x, "float32"), training=training)
        return [float(self.to_array(each)) for each in quantizer.losses]

    def entries(self, quantizer: Any) -> dict[str, Array]:
        store: dict[str, Array] = {}
        quantizer.save_own_variables(store)
        return store

    def restore_entries(self, quantizer: Any, state: State) -> None:
        quantizer.load_own_variables(dict(state))

    def trained(self, quantizer: Any) -> dict[str, Any]:
        return {self.framework.variable_name(variable): variable for variable in quantizer.trainable_variables}

    def descend(self, quantizer: Any, gradients: Mapping[str, Array]) -> None:
        trained = self.trained(quantizer)
        for name in trained.keys() & gradients.keys():
            trained[name].assign_sub(self.framework.functions.floats(gradients[name]))

    def copy(self, quantizer: Any) -> Any:
        return copy.deepcopy(quantizer)

    def model(self) -> tuple[Any, Any, Callable[[Any], Array]]:
        keras = self.framework.module
        batch = self.framework.functions.floats(np.linspace(-1.0, 1.0, 12).reshape(4, 3))
        model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, name="dense")])
        return model, batch, lambda model: self.to_array(model(batch, training=False))


class InDense:
    """A wrapped layer as the conformance kit calls it: on unit vectors, so that its output is its kernel.

    Parameters
    ----------
    adapter : KerasAdapter
        Of the layer's Keras.
    quantizer : object
        The kernel's.
    weights : float32 array, shape (rows, columns)
        The kernel.
    """

    def __init__(self, adapter: KerasAdapter, quantizer: Any, weights: Array) -> None:
        self.adapter, self.quantizer = adapter, quantizer
        self.counts_steps = not adapter.counts_calls
        dense = adapter.framework.module.layers.Dense(weights.shape[1], use_bias=False)
        dense.build((None, weights.shape[0]))
        self.kernel = dense.kernel
        self.kernel.assign(weights)
        wrapper: Any = adapter.framework.wrapper  # each Keras's has a constructor of its own
        self.layer = wrapper(dense, {"kernel": quantizer})

    def assign(self, weights: Array) -> None:
        """Give the layer another kernel."""
        self.kernel.assign(weights)

    def __call__(self, *, training: bool, upstream: Array | None) -> Run:
        """Return a run of the layer; the gradient of the kernel stands for that of the input."""
        adapter, trained = self.adapter, self.adapter.trained(self.quantizer)
        units = adapter.tensor(np.eye(self.kernel.shape[0], dtype=np.float32), "float32")
        known = {} if upstream is None else {"": self.kernel, **trained}
        call: Callable[[Any], Any] = functools.partial(self.layer, training=training)
        output, *found = adapter.differentiated(call, units, known, upstream)
        arrays = [None if each is None else adapter.to_array(each) for each in found[1:]]
        d_kernel, *d_variables = arrays or [None]
        zeros = [np.zeros(tuple(each.shape), np.float32) for each in trained.values()]
        filled = [zero if each is None else each for each, zero in zip(d_variables, zeros, strict=False)]
        kernel = adapter.to_array(self.kernel)
        variables = dict(zip(trained, filled, strict=False))
        return Run(adapter.to_array(output), "float32", adapter.devices[0], kernel, d_kernel, variables)
