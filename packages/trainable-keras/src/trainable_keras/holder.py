"""The activation quantization holder: what mctq's is for Keras 2, native."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from trainable_core.calibration import Observer
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import CalibrationError
from trainable_core.model_document import plan_document, plan_from_document
from trainable_core.plan import LayerPlan, require_quantizer
from trainable_core.saved_quantizer import quantizer_document, quantizer_from_document
from trainable_keras.engine import Tensor, errors_as_they_are, to_numpy
from trainable_keras.inferable import class_of
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer


@keras.saving.register_keras_serializable(package="trainable_keras")
class ActivationQuantizationHolder(keras.layers.Layer):  # type: ignore[misc] # keras is untyped
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

    observer: Observer | None

    def __init__(self, activation_holder_quantizer: Any, name: str | None = None) -> None:
        require_quantizer(activation_holder_quantizer, QuantizationTarget.Activation, type(self).__name__)
        super().__init__(name=name, dtype="float32", autocast=False)
        self.supports_masking = True
        self.activation_holder_quantizer = activation_holder_quantizer
        self.observer = None
        self.plan: LayerPlan | None = None
        self.tensor = ""
        self.notes: dict[str, Any] | None = None
        activation_holder_quantizer.initialize_quantization(None, "activation", self)
        self.built = True

    @property
    def trainable_quantizer(self) -> BaseKerasTrainableQuantizer | None:
        """The quantizer while it is trainable, None once it is inferable."""
        quantizer = self.activation_holder_quantizer
        return quantizer if isinstance(quantizer, BaseKerasTrainableQuantizer) else None

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # noqa: FBT001 - Keras's signature
        """Return the input quantized."""
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype)):
            return inputs
        if self.observer is not None:
            with errors_as_they_are():
                self._observe(self.observer, inputs)
            return inputs
        if self.trainable_quantizer is None:
            return self.activation_holder_quantizer(inputs)
        return self.activation_holder_quantizer(inputs, training=training)

    def _observe(self, observer: Observer, inputs: Tensor) -> None:
        try:
            observer.update(to_numpy(ops.cast(inputs, "float32")))
        except CalibrationError as error:
            subject = getattr(self.activation_holder_quantizer, "subject", "activation")
            hint = "look for the layer whose output diverges, or the bad batch."
            raise CalibrationError(subject, error.problem, hint) from error

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002, FBT001 - Keras's signature
        """Return the input's own shape and dtype."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def convert_to_inferable_quantizers(self) -> None:
        """Put the inferable quantizer in the trainable one's place; does nothing the second time."""
        if self.trainable_quantizer is not None:
            inferable = self.trainable_quantizer.convert2inferable()
            self._tracker.unlock()
            self._tracker.untrack(self.activation_holder_quantizer)
            self.activation_holder_quantizer = inferable
            self._tracker.lock()

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the quantizer's variables are there from the start."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the holder from; JSON-clean."""
        return {
            "name": self.name,
            "quantizer": quantizer_document(self.activation_holder_quantizer),
            "plan": None if self.plan is None else plan_document(self.plan),
            "tensor": self.tensor,
            "notes": self.notes,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ActivationQuantizationHolder:
        """Return a holder equal to the one that `get_config` was called on."""
        holder = cls(quantizer_from_document(config["quantizer"], "keras", class_of), name=config["name"])
        holder.plan = None if config["plan"] is None else plan_from_document(config["plan"])
        holder.tensor, holder.notes = config["tensor"], config["notes"]
        return holder
