"""The activation quantization holder: mctq's, mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from mct_quantizers import KerasActivationQuantizationHolder

from trainable_core.backend.building import require_quantizer
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.enums import QuantizationTarget
from trainable_core.errors import CalibrationError
from trainable_keras.keras2.engine import Tensor, keras, plainly, to_numpy, unconverted
from trainable_keras.keras2.granularity import class_of
from trainable_keras.keras2.quantizers import count_step
from trainable_keras.parts import KerasHolder, told_of


@keras.saving.register_keras_serializable(package="trainable_keras.keras2")
class ActivationQuantizationHolder(
    KerasHolder,
    keras.layers.Layer,  # type: ignore[misc] # TensorFlow is untyped
    metaclass=UnlistedSubclass,
    of=KerasActivationQuantizationHolder,
):
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

    backend = "tf_keras"
    class_of = staticmethod(class_of)

    def __init__(self, activation_holder_quantizer: Any, name: str | None = None) -> None:
        require_quantizer(activation_holder_quantizer, QuantizationTarget.Activation, type(self).__name__)
        super().__init__(activation_holder_quantizer, name=name, dtype="float32", autocast=False)
        self.supports_masking = True
        self.start(activation_holder_quantizer)
        self.built = True

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
        if told_of(self).observer is not None:
            if tf.executing_eagerly():
                self._show(inputs)
            return inputs
        arguments = {}
        if self.trainable_quantizer is not None:
            count_step([self.trainable_quantizer], training)
            arguments["training"] = training
        if not self.sends_ties_to_even:
            return self.activation_holder_quantizer(inputs, **arguments)
        return tf.cast(self.activation_holder_quantizer(self.off_ties(inputs), **arguments), inputs.dtype)

    def _show(self, inputs: Tensor) -> None:
        try:
            self.observe(to_numpy(tf.cast(inputs, tf.float32)))
        except CalibrationError as error:
            raise plainly(error) from error.__cause__

    def convert_to_inferable_quantizers(self) -> None:
        """Put the inferable quantizer in the trainable one's place; does nothing the second time."""
        if self.deployable_quantizer is not None:
            self.activation_holder_quantizer = self.deployable_quantizer.convert2inferable()

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the holder from; JSON-clean."""
        return {**super().get_config(), "trainable": self.trainable}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ActivationQuantizationHolder:
        """Return a holder equal to the one that `get_config` was called on."""
        holder: ActivationQuantizationHolder = super().from_config(config)
        if not config["trainable"]:
            holder.trainable = False
        return holder
