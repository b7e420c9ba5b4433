"""The activation quantization holder: what mctq's is for Keras 2, native."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainable_core.backend.building import require_quantizer
from trainable_core.enums import QuantizationTarget
from trainable_keras.keras3.engine import Tensor, errors_as_they_are, to_numpy
from trainable_keras.keras3.granularity import class_of
from trainable_keras.parts import KerasHolder, told_of


@keras.saving.register_keras_serializable(package="trainable_keras")
class ActivationQuantizationHolder(KerasHolder, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """A layer that quantizes what passes through it.

    Parameters
    ----------
    activation_holder_quantizer : BaseKerasTrainableQuantizer or InferableQuantizer
        The quantizer; initialized here.
    name : str, optional
        Name of the layer.

    Notes
    -----
    mctq's own holder can't be built on Keras 3 (it needs ``keras.backend.learning_phase``). Integer tensors pass
    untouched. While `observer` is set, values are seen and passed on as they are.
    """

    backend = "keras"
    class_of = staticmethod(class_of)

    def __init__(self, activation_holder_quantizer: Any, name: str | None = None) -> None:
        require_quantizer(activation_holder_quantizer, QuantizationTarget.Activation, type(self).__name__)
        super().__init__(name=name, dtype="float32", autocast=False)
        self.supports_masking = True
        self.activation_holder_quantizer = activation_holder_quantizer
        self.start(activation_holder_quantizer)
        self.built = True

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # noqa: FBT001 - Keras's signature
        """Return the input quantized."""
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype)):
            return inputs
        if told_of(self).observer is not None:
            with errors_as_they_are():
                self.observe(to_numpy(ops.cast(inputs, "float32")))
            return inputs
        arguments = {} if self.trainable_quantizer is None else {"training": training}
        if not self.sends_ties_to_even:
            return self.activation_holder_quantizer(inputs, **arguments)
        return ops.cast(self.activation_holder_quantizer(self.off_ties(inputs), **arguments), inputs.dtype)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002, FBT001 - Keras's signature
        """Return the input's own shape and dtype."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def convert_to_inferable_quantizers(self) -> None:
        """Put the inferable quantizer in the trainable one's place; does nothing the second time."""
        if self.deployable_quantizer is not None:
            inferable = self.deployable_quantizer.convert2inferable()
            self._tracker.unlock()
            self._tracker.untrack(self.activation_holder_quantizer)
            self.activation_holder_quantizer = inferable
            self._tracker.lock()

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the quantizer's variables are there from the start."""
