# ruff: noqa: D102 - what each method does is said in trainable_core.conformance.adapter.Adapter
"""What both Kerases show the conformance kit in the same way; each Keras's adapter adds how a gradient is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.enums import TieRule
from trainable_keras.framework import Framework

Array = NDArray[Any]


class KerasAdapter:
    """The part of a `trainable_core.conformance.adapter.Adapter` that is the same for both Kerases.

    Parameters
    ----------
    framework : Framework
        The Keras.
    """

    tie_rule, subnormals = TieRule.HALF_UP, False

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

    def deploy(self, quantizer: Any, x: Array) -> Array:
        return self.to_array(quantizer.convert2inferable()(self.framework.functions.floats(x)))

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
