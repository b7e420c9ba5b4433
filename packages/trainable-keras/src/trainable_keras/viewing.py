"""A wrapped Keras model as core looks at it, to follow its training and to report on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from trainable_core.backend.view import ModelView, QuantizedTensor, See
from trainable_core.calibration.batches import inputs_of
from trainable_core.qparams import Float32
from trainable_keras.calibration import calls_replaced, put_back
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasWrapper, holders_of, plan_of, told_of
from trainable_keras.statistics import batch_norms
from trainable_keras.wrapping import parts_of


class KerasView(ModelView):
    """What core asks of Keras.

    Parameters
    ----------
    framework : Framework
        The Keras that the model belongs to.
    qmodel : keras.Model
        What `wrap` or `finalize` returned.
    """

    def __init__(self, framework: Framework, qmodel: Any) -> None:
        super().__init__(qmodel)
        self.framework = framework

    def tensors(self) -> list[QuantizedTensor]:
        """Return the model's quantized tensors."""
        found: list[QuantizedTensor] = []
        for part in parts_of(self.model):
            layer = plan_of(part).layer.name
            if isinstance(part, KerasWrapper):
                found += [
                    QuantizedTensor(layer, attribute, quantizer, weight=(part, attribute))
                    for attribute, quantizer in part.weights_quantizers.items()
                ]
            found += [
                QuantizedTensor(layer, told_of(each).tensor, each.activation_holder_quantizer, holder=each)
                for each in holders_of(part)
            ]
        return found

    def values(self, tensor: QuantizedTensor) -> Float32:
        """Return a weight's float values."""
        part, attribute = tensor.weight
        return self._array(part.weight_now(attribute))

    def quantized(self, tensor: QuantizedTensor) -> Float32:
        """Return what a weight's quantizer makes of it in evaluation mode."""
        part, attribute = tensor.weight
        weight = part.weight_now(attribute)
        with self.framework.eagerly():
            if hasattr(tensor.quantizer, "quantization_config"):
                return self._array(tensor.quantizer(weight, training=False))
            return self._array(tensor.quantizer(weight))

    @contextmanager
    def seeing(self, seen: Mapping[Any, See]) -> Iterator[None]:
        """Show what reaches some holders, eagerly, while the model is called as in inference."""
        to_numpy = self.framework.functions.to_numpy
        replaced = [(holder, partial(_shown, see, to_numpy)) for holder, see in seen.items()]
        with calls_replaced(replaced), self.framework.eagerly(), put_back(self.framework, self.model):
            yield

    def _array(self, value: Any) -> Float32:
        return np.asarray(self.framework.functions.to_numpy(value), np.float32)

    def call(self, batch: Any) -> Any:
        """Call the model with a batch's inputs."""
        return self.model(inputs_of(batch), training=False)

    def is_tensor(self, batches: Any) -> bool:
        """Return whether this is one batch."""
        return bool(self.framework.functions.is_tensor(batches)) or hasattr(batches, "__array__")

    def batch_norms(self) -> dict[str, tuple[Float32, Float32]]:
        """Return moving mean and variance of each batch norm that learns."""
        return {
            norm.name: (self._array(norm.moving_mean), self._array(norm.moving_variance))
            for norm in batch_norms(self.framework, self.model)
        }


def _shown(see: See, to_numpy: Callable[[Any], Any], call: Callable[..., Any]) -> Callable[..., Any]:
    def called(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "float" in str(getattr(inputs, "dtype", "")):
            see(np.asarray(to_numpy(inputs), np.float32))
        return call(inputs, *args, **kwargs)

    return called
