"""mctq's Keras inferable quantizers, mended: one class per target and grid, each still an instance of mctq's.

Mended against mctq 1.7, whose classes call TensorFlow's ``fake_quant`` kernels (the measurements are in
`docs/design/0017-mended-mctq-keras.md`):

- the forward is `ops.snap`, the formula that trained; the kernels nudge ranges once more in float32 and may give the
  neighbouring code next to a tie;
- 1-bit grids work, and inputs of any floating dtype come back in their own dtype;
- a quantizer is a layer and its numbers are weights: they are saved, and no graph compiler takes them for constants
  that it multiplies into the layers around, which moves ties;
- `get_config` is JSON-clean whatever numbers the quantizer was made from.

`InferableQuantizer.to_mctq` gives mctq's stock quantizer with the same numbers, for tools that look for TensorFlow's
``FakeQuant`` operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from mct_quantizers import QuantizationMethod as MctqMethod
from mct_quantizers import QuantizationTarget as MctqTarget
from mct_quantizers import mark_quantizer
from mct_quantizers.common.base_inferable_quantizer import QuantizerID
from mct_quantizers.keras import quantizers as mctq
from numpy.typing import NDArray

from trainable_core.backend.inferable import KerasDeployed, by_grid, grid_of_arguments
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import ModelError
from trainable_core.qparams import QParams
from trainable_keras.keras2 import ops
from trainable_keras.keras2.engine import Tensor, keras, read, to_numpy, unconverted, untracked

MCTQ_LEAST_BITS = 2
"""TensorFlow's kernels have no 1-bit grid."""


class InferableQuantizer(KerasDeployed, keras.layers.Layer):  # type: ignore[misc] # TensorFlow is untyped
    """What every deployed quantizer shares.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers.
    n_bits : int
        Width of the codes.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    """

    mctq_class: ClassVar[Any] = None
    to_numpy = staticmethod(to_numpy)

    def __init__(self, qparams: QParams, n_bits: int, ndim: int) -> None:
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False, trainable=False)
        self.supports_masking = True
        along = qparams.along(ndim)
        with untracked(self):
            self.start(qparams, n_bits, ndim)
        self.grid_scale = self._number("grid_scale", along.scale)
        self.grid_zero_point = self._number("grid_zero_point", along.zero_point)
        self.built = True

    def _number(self, name: str, value: NDArray[Any]) -> Any:
        return self.add_weight(
            name=f"{self.name}/{name}",
            shape=np.shape(value),
            dtype="float32",
            initializer=keras.initializers.Constant(np.asarray(value, np.float32)),
            trainable=False,
        )

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the input snapped to the grid; see `call`."""
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; no gradient is defined."""
        return self._snapped(inputs)

    @unconverted
    def _snapped(self, inputs: Tensor) -> Tensor:
        values = tf.stop_gradient(tf.cast(inputs, tf.float32))
        zero_point = read(self.grid_zero_point) if self.method() is QuantizationMethod.UNIFORM else None
        snapped = ops.snap(values, read(self.grid_scale), zero_point, self.quant_min, self.quant_max)
        return tf.cast(snapped, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def to_mctq(self) -> Any:
        """Return mctq's stock inferable quantizer with the same numbers.

        Raises
        ------
        ModelError
            For 1 bit: TensorFlow's kernels can't do that.
        """
        if self.num_bits < MCTQ_LEAST_BITS:
            raise ModelError(f"mctq's Keras quantizers need 2 to 16 bits; this one has {self.num_bits}")
        return self.mctq_class(**self.mctq_arguments())

    def get_config(self) -> dict[str, Any]:
        """Return mctq's arguments: JSON-clean and lossless."""
        return self.mctq_arguments()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> InferableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on."""
        return cls(*grid_of_arguments(config, cls.method()))


def _deployed(target: QuantizationTarget, method: QuantizationMethod) -> Any:
    """Return the decorator of a deployed class: mctq's mark, and the name that Keras saves it under."""

    def decorate(cls: Any) -> Any:
        cls.mctq_class = getattr(mctq, cls.__name__)
        marked = mark_quantizer(MctqTarget[target.name], [MctqMethod[method.name]], QuantizerID.INFERABLE)(cls)
        return keras.saving.register_keras_serializable(package="trainable_keras.keras2")(marked)

    return decorate


@_deployed(QuantizationTarget.Weights, QuantizationMethod.SYMMETRIC)
class WeightsSymmetricInferableQuantizer(InferableQuantizer, mctq.WeightsSymmetricInferableQuantizer):  # type: ignore[misc]
    """Deployed SYMMETRIC weights."""


@_deployed(QuantizationTarget.Weights, QuantizationMethod.POWER_OF_TWO)
class WeightsPOTInferableQuantizer(InferableQuantizer, mctq.WeightsPOTInferableQuantizer):  # type: ignore[misc]
    """Deployed POWER_OF_TWO weights."""


@_deployed(QuantizationTarget.Weights, QuantizationMethod.UNIFORM)
class WeightsUniformInferableQuantizer(InferableQuantizer, mctq.WeightsUniformInferableQuantizer):  # type: ignore[misc]
    """Deployed UNIFORM weights."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.SYMMETRIC)
class ActivationSymmetricInferableQuantizer(InferableQuantizer, mctq.ActivationSymmetricInferableQuantizer):  # type: ignore[misc]
    """Deployed SYMMETRIC activations."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.POWER_OF_TWO)
class ActivationPOTInferableQuantizer(InferableQuantizer, mctq.ActivationPOTInferableQuantizer):  # type: ignore[misc]
    """Deployed POWER_OF_TWO activations."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.UNIFORM)
class ActivationUniformInferableQuantizer(InferableQuantizer, mctq.ActivationUniformInferableQuantizer):  # type: ignore[misc]
    """Deployed UNIFORM activations."""


_CLASSES = by_grid(
    WeightsSymmetricInferableQuantizer,
    WeightsPOTInferableQuantizer,
    WeightsUniformInferableQuantizer,
    ActivationSymmetricInferableQuantizer,
    ActivationPOTInferableQuantizer,
    ActivationUniformInferableQuantizer,
)


def class_of(target: QuantizationTarget, method: QuantizationMethod) -> type[InferableQuantizer]:
    """Return the deployed class of a target and a grid."""
    cls: type[InferableQuantizer] = _CLASSES[target, method]
    return cls


def build(
    target: QuantizationTarget, method: QuantizationMethod, n_bits: int, qparams: QParams, ndim: int
) -> InferableQuantizer:
    """Return the inferable quantizer of a grid.

    Parameters
    ----------
    target, method
        Which class.
    n_bits : int
        Width of the codes.
    qparams : QParams
        The grid's numbers.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    """
    return class_of(target, method)(qparams, n_bits, ndim)
