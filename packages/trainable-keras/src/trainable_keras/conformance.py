# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""What both Kerases show the conformance kit in the same way; each Keras's adapter adds how a gradient is taken."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.adapter import BaseAdapter, Observed, Run, State, Way
from trainable_core.enums import TieRule
from trainable_keras.framework import Framework

Array = NDArray[Any]

GRAPH, UNKNOWN_BATCH = "graph", "graph of an unknown batch"
"""Modes of `Adapter.execute` that both Kerases have."""


def mode_of(quantizer: Any, mode: str) -> str:
    """Return the mode in which a quantizer is called: blocks are parts of weights, whose sizes are always known."""
    in_blocks = mode == UNKNOWN_BATCH and quantizer.quantization_config.blocks is not None
    return GRAPH if in_blocks else mode


class KerasAdapter(BaseAdapter):
    """The part of a `trainable_core.conformance.adapter.Adapter` that is the same for both Kerases.

    Parameters
    ----------
    framework : Framework
        The Keras.
    """

    tie_rule, subnormals, blocks = TieRule.HALF_UP, False, True
    devices: tuple[str, ...]
    cases = 54  # an eager call takes milliseconds, and every shape is traced anew

    def __init__(self, framework: Framework) -> None:
        self.framework = framework
        self.backend = framework.backend

    def to_array(self, x: Any) -> Array:
        """Return a copy of a tensor's values; bfloat16, which NumPy lacks, as float32."""
        array = self.framework.functions.to_numpy(x)
        return np.array(array, np.float32 if array.dtype.name == "bfloat16" else None)

    def build(self, cls: type[Any], config: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
        quantizer = cls(config, **arguments)
        quantizer.initialize_quantization(shape, "tensor", None)
        return quantizer

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

    def collected(self, quantizer: Any, x: Array) -> list[float]:
        quantizer(self.tensor(x, "float32"), training=True)
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
