"""The activation quantization holder: mctq's, mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder

from trainable_core.calibration import Observer
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import CalibrationError
from trainable_core.model_document import plan_document, plan_from_document
from trainable_core.plan import LayerPlan, require_quantizer
from trainable_core.saved_quantizer import quantizer_document, quantizer_from_document
from trainable_tfkeras.engine import Tensor, keras, plainly, to_numpy, unconverted, untracked
from trainable_tfkeras.inferable import class_of
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer, count_step


@keras.saving.register_keras_serializable(package="trainable_tfkeras")
class ActivationQuantizationHolder(KerasActivationQuantizationHolder):  # type: ignore[misc] # mctq is untyped
    """A layer that quantizes what passes through it.

    Parameters
    ----------
    activation_holder_quantizer : BaseKerasTrainableQuantizer or mctq inferable quantizer
        The quantizer; initialized here.
    name : str, optional
        Name of the layer.

    Notes
    -----
    Mended against mctq: the quantizer is initialized once, not at each build; conversion is idempotent and leaves the
    layer in its place; the holder has no ``steps`` weight, so float checkpoints fit; masks pass; integer tensors pass
    untouched; half precision stays half. While `observer` is set, values are seen and passed on as they are.
    """

    observer: Observer | None

    def __init__(self, activation_holder_quantizer: Any, name: str | None = None) -> None:
        require_quantizer(activation_holder_quantizer, QuantizationTarget.Activation, type(self).__name__)
        super().__init__(activation_holder_quantizer, name=name, dtype="float32", autocast=False)
        self.supports_masking = True
        with untracked(self):
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

    def build(self, input_shape: Any) -> None:
        """Do nothing but note the shape: the quantizer's variables are there from the start."""
        keras.layers.Layer.build(self, input_shape)

    def call(self, inputs: Tensor, training: Any = None) -> Tensor:
        """Return the input quantized."""
        return self._call(inputs, training)

    @unconverted
    def _call(self, inputs: Tensor, training: Any) -> Tensor:
        if not inputs.dtype.is_floating:
            return inputs
        if self.observer is not None:
            if tf.executing_eagerly():
                self._observe(inputs)
            return inputs
        if self.trainable_quantizer is None:
            return self.activation_holder_quantizer(inputs)
        count_step([self.trainable_quantizer], training)
        return self.activation_holder_quantizer(inputs, training=training)

    def _observe(self, inputs: Tensor) -> None:
        assert self.observer is not None  # noqa: S101 - that is when it is called
        try:
            self.observer.update(to_numpy(tf.cast(inputs, tf.float32)))
        except CalibrationError as error:
            subject = getattr(self.activation_holder_quantizer, "subject", "activation")
            hint = "look for the layer whose output diverges, or the bad batch."
            raise plainly(CalibrationError(subject, error.problem, hint)) from error

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def convert_to_inferable_quantizers(self) -> None:
        """Put the inferable quantizer in the trainable one's place; does nothing the second time."""
        if self.trainable_quantizer is not None:
            self.activation_holder_quantizer = self.trainable_quantizer.convert2inferable()

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the holder from; JSON-clean."""
        return {
            "name": self.name,
            "trainable": self.trainable,
            "quantizer": quantizer_document(self.activation_holder_quantizer),
            "plan": None if self.plan is None else plan_document(self.plan),
            "tensor": self.tensor,
            "notes": self.notes,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ActivationQuantizationHolder:
        """Return a holder equal to the one that `get_config` was called on."""
        holder = cls(quantizer_from_document(config["quantizer"], "tf_keras", class_of), name=config["name"])
        with untracked(holder):
            holder.plan = None if config["plan"] is None else plan_from_document(config["plan"])
            holder.tensor = config["tensor"]
            holder.notes = config["notes"]
        if not config["trainable"]:
            holder.trainable = False
        return holder
