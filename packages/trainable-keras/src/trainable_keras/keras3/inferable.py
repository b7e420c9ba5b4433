"""Deployed quantizers: one class per target and grid; on the TensorFlow engine each is an instance of mctq's.

mctq's Keras classes call TensorFlow's ``fake_quant`` kernels, so they need the TensorFlow engine, 2 to 16 bits and
float32 inputs. These run on every engine, and mend that:

- the forward is `ops.snap`, the formula that trained; TensorFlow's kernels give the same codes except next to ties,
  where they may be one step off (`ops` has the measurement);
- 1-bit grids work, and half-precision inputs come back in their own dtype;
- the numbers are variables of a layer: a graph compiler that sees constants multiplies them into the layers around,
  which moves ties.

`InferableQuantizer.to_mctq` gives mctq's stock quantizer with the same numbers, for tools that look for TensorFlow's
``FakeQuant`` operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops as keras_ops
from mct_quantizers import QuantizationMethod as MctqMethod
from mct_quantizers import QuantizationTarget as MctqTarget
from mct_quantizers import mark_quantizer
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer, QuantizerID

from trainable_core.backend.inferable import KerasDeployed, by_grid, grid_of_arguments
from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import ModelError
from trainable_core.qparams import QParams
from trainable_keras.keras3 import ops
from trainable_keras.keras3.engine import ENGINE, Tensor, float_tensor, read, to_numpy

if ENGINE == "tensorflow":
    from mct_quantizers.keras import quantizers as _mctq_module

    mctq: Any = _mctq_module
else:
    mctq = None

MCTQ_LEAST_BITS = 2
"""TensorFlow's kernels have no 1-bit grid."""


class InferableQuantizer(KerasDeployed, keras.layers.Layer):  # type: ignore[misc] # keras is untyped
    """What every deployed quantizer shares.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers.
    n_bits : int
        Width of the codes.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    name : str, optional
        Name of the layer.
    """

    mctq_class: ClassVar[Any] = None
    to_numpy = staticmethod(to_numpy)

    def __init__(self, qparams: QParams, n_bits: int, ndim: int, name: str | None = None) -> None:
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False, trainable=False, name=name)
        self.supports_masking = True
        self.start(qparams, n_bits, ndim)
        along = qparams.along(ndim)
        self.grid_scale = self._number("grid_scale", along.scale)
        self.grid_zero_point = self._number("grid_zero_point", along.zero_point)
        self.built = True

    def _number(self, name: str, value: Any) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=np.shape(value),
            dtype="float32",
            initializer=lambda shape, dtype=None: float_tensor(value),  # noqa: ARG005 - Keras's signature
            trainable=False,
            autocast=False,
        )

    def call(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype; no gradient is defined."""
        uniform = self.method() is QuantizationMethod.UNIFORM
        values = keras_ops.stop_gradient(keras_ops.cast(inputs, "float32"))
        zero_point = read(self.grid_zero_point) if uniform else None
        snapped = ops.snap(values, read(self.grid_scale), zero_point, self.quant_min, self.quant_max)
        return keras_ops.cast(snapped, keras.backend.standardize_dtype(inputs.dtype))

    def compute_output_spec(self, inputs: Any) -> Any:
        """Return the input's own shape and dtype."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: the numbers are there from the start."""

    def to_mctq(self) -> Any:
        """Return mctq's stock inferable quantizer with the same numbers.

        Raises
        ------
        ModelError
            On another engine than TensorFlow, or for 1 bit: mctq's class can't do that.
        """
        if self.mctq_class is None or self.num_bits < MCTQ_LEAST_BITS:
            raise ModelError(
                f"mctq's Keras quantizers need the TensorFlow engine and 2 to 16 bits; this is {ENGINE} with "
                f"{self.num_bits} bits"
            )
        return self.mctq_class(**self.mctq_arguments())

    def get_config(self) -> dict[str, Any]:
        """Return mctq's arguments, the name, and whether a symmetric grid is signed: JSON-clean and lossless."""
        return {**self.mctq_arguments(), "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> InferableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on."""
        qparams, n_bits, ndim = grid_of_arguments(config, cls.method())
        return cls(qparams, n_bits, ndim, name=config.get("name"))


def _mended(name: str) -> Any:
    """Return what a deployed class inherits: mctq's class of that name where it runs, else mctq's base."""
    return BaseInferableQuantizer if mctq is None else getattr(mctq, name)


def _deployed(target: QuantizationTarget, method: QuantizationMethod) -> Any:
    """Return the decorator of a deployed class: mctq's mark, and the name that Keras saves it under."""

    def decorate(cls: Any) -> Any:
        if mctq is not None:
            cls.mctq_class = getattr(mctq, cls.__name__)
        marked = mark_quantizer(MctqTarget[target.name], [MctqMethod[method.name]], QuantizerID.INFERABLE)(cls)
        return keras.saving.register_keras_serializable(package="trainable_keras")(marked)

    return decorate


@_deployed(QuantizationTarget.Weights, QuantizationMethod.SYMMETRIC)
class WeightsSymmetricInferableQuantizer(InferableQuantizer, _mended("WeightsSymmetricInferableQuantizer")):  # type: ignore[misc]
    """Deployed SYMMETRIC weights."""


@_deployed(QuantizationTarget.Weights, QuantizationMethod.POWER_OF_TWO)
class WeightsPOTInferableQuantizer(InferableQuantizer, _mended("WeightsPOTInferableQuantizer")):  # type: ignore[misc]
    """Deployed POWER_OF_TWO weights."""


@_deployed(QuantizationTarget.Weights, QuantizationMethod.UNIFORM)
class WeightsUniformInferableQuantizer(InferableQuantizer, _mended("WeightsUniformInferableQuantizer")):  # type: ignore[misc]
    """Deployed UNIFORM weights."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.SYMMETRIC)
class ActivationSymmetricInferableQuantizer(InferableQuantizer, _mended("ActivationSymmetricInferableQuantizer")):  # type: ignore[misc]
    """Deployed SYMMETRIC activations."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.POWER_OF_TWO)
class ActivationPOTInferableQuantizer(InferableQuantizer, _mended("ActivationPOTInferableQuantizer")):  # type: ignore[misc]
    """Deployed POWER_OF_TWO activations."""


@_deployed(QuantizationTarget.Activation, QuantizationMethod.UNIFORM)
class ActivationUniformInferableQuantizer(InferableQuantizer, _mended("ActivationUniformInferableQuantizer")):  # type: ignore[misc]
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
