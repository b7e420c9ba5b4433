"""The base of every Keras quantizer: a layer that owns its variables; the rest is core's.

A training method subclasses it and writes `fake_quantize`. Everything else has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, VariableGroup
from trainable_core.errors import QuantizerStateError, ShapeMismatchError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras3 import grid as grids
from trainable_keras.keras3 import inferable
from trainable_keras.keras3.engine import Tensor, errors_as_they_are, float_tensor, infers_shapes, read, to_numpy
from trainable_keras.keras3.grid import Grid


class BaseKerasTrainableQuantizer(keras.layers.Layer, BaseTrainableQuantizer, BaseInferableQuantizer):  # type: ignore[misc]
    """Base class of trainable Keras quantizers.

    Parameters
    ----------
    quantization_config : TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig
        What to quantize and how; empty params are filled in by calibration.
    freeze_quant_params : bool
        Whether the quantizer's variables stay as they are while the model trains.

    Notes
    -----
    Variables are float32 whatever the dtype policy; fake quantization is computed in float32 and returned in the
    input's dtype. NaN inputs stay NaN, infinities saturate. Ties go up, as in TensorFlow's kernels.
    """

    backend: ClassVar[str] = "keras"

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False)
        self.supports_masking = True
        self.learned: list[str] = []
        BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)

    def fake_quantize(self, x: Tensor, grid: Grid, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` on the grid, with this method's gradient; what a training method writes.

        Parameters
        ----------
        x : Tensor, float32, any shape
            Real values.
        grid : Grid
            Its numbers, shaped to broadcast against `x`; gradients given to `grid.scale` and `grid.zero_point` reach
            the variables.
        training : bool
            Whether the model trains.

        Returns
        -------
        Tensor, float32, shape of `x`
            With values that equal ``ops.snap`` on the same grid, when training equals deployment.
        """
        raise NotImplementedError

    def quantized(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return `x` fake-quantized on the selected width's grid; a method that mixes widths overrides it.

        It is not called ``quantize``: every Keras layer has a method of that name, for post-training quantization.
        """
        return self.fake_quantize(x, self.grid(len(x.shape)), training)

    def __call__(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:  # noqa: FBT001 - mctq's call
        """Return the input fake-quantized; see `call`.

        Raises
        ------
        QuantizerStateError
            Before calibration.
        ShapeMismatchError
            When the input is no floating tensor, or has another number of channels than the quantizer.
        """
        if not self.quantization_config.enabled or (not self.calibrated and infers_shapes()):
            return inputs
        if not isinstance(inputs, keras.KerasTensor):
            with errors_as_they_are():
                self.require_calibrated()
                self._check_input(inputs)
        return super().__call__(inputs, training=training, **kwargs)

    def _check_input(self, inputs: Any) -> None:
        dtype = getattr(inputs, "dtype", None)
        if dtype is None or not keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype)):
            raise ShapeMismatchError(self.subject, "a floating tensor", dtype or type(inputs).__name__)
        axis, shape = self.quantization_config.channels_axis, tuple(inputs.shape)
        if axis is not None:
            channels = next(iter(self.grid_variables(self.widths[0]).values())).shape[0]
            if not -len(shape) <= axis < len(shape) or shape[axis] != channels:
                raise ShapeMismatchError(self.subject, f"{channels} channels along axis {axis}", f"shape {shape}")

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return the input fake-quantized, in its own dtype.

        Parameters
        ----------
        inputs : Tensor, any shape and floating dtype
            What to quantize.
        training : bool, optional
            Whether the model trains; by default what Keras says.
        """
        if training and type(self).advance is not BaseTrainableQuantizer.advance:
            self.advance()
        if training:
            term = self.regularization()
            if term is not None:
                self.add_loss(term)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        quantized = self.quantized(ops.cast(inputs, "float32"), bool(training))
        return ops.cast(quantized, dtype)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002, FBT001 - Keras's signature
        """Return the input's own shape and dtype: a symbolic call works before calibration."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def grid(self, ndim: int, width: int | None = None) -> Grid:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        config = self.quantization_config
        width = self.selected_width if width is None else width
        variables = {key: read(variable) for key, variable in self.grid_variables(width).items()}
        if config.channels_axis is not None:
            shape = [1] * ndim
            shape[config.channels_axis] = -1
            variables = {key: ops.reshape(variable, shape) for key, variable in variables.items()}
        if config.quantization_method is QuantizationMethod.UNIFORM:
            return grids.uniform(variables[RANGE_MIN], variables[RANGE_MAX], width, min_threshold=config.min_threshold)
        return grids.symmetric(
            variables[THRESHOLD],
            width,
            signed=self.signed,
            power_of_two=config.quantization_method is QuantizationMethod.POWER_OF_TWO,
            min_threshold=config.min_threshold,
        )

    def convert2inferable(self) -> inferable.InferableQuantizer:
        """Return the inferable quantizer with the trained numbers; this quantizer goes on as it is.

        On the TensorFlow engine it is an instance of mctq's class.

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the config switches quantization off.
        """
        config = self.quantization_config
        if not config.enabled:
            raise QuantizerStateError(self.subject, "its config switches quantization off; there is nothing to deploy")
        width = self.selected_width
        qparams = self.current_qparams(width)
        return inferable.build(config.target, config.quantization_method, width, qparams, self.tensor_ndim)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen
        self._set_learning()

    def _set_learning(self) -> None:
        for name in self.learned:
            self.get_quantizer_variable(name).trainable = self.trainable and not self.freeze_quant_params

    @property
    def trainable(self) -> bool:
        """Whether the layer may train; frozen quantization parameters stay frozen when it is set."""
        return bool(super().trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)
        if hasattr(self, "learned") and hasattr(self, "freeze_quant_params"):
            self._set_learning()

    # ---- the primitives core asks for -------------------------------------------------------------------------------

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 variable; see core's base class."""
        value = np.asarray(variable, np.float32)
        learns = self.learns_grid if trained is None else trained
        created = self.add_weight(
            name=name,
            shape=value.shape,
            dtype="float32",
            initializer=lambda shape, dtype=None: float_tensor(value),  # noqa: ARG005 - Keras's signature
            trainable=learns,
            autocast=False,
        )
        setattr(self, name, created)
        self._variable_groups[name] = group
        if learns:
            self.learned.append(name)
            self._set_learning()

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the variables for a tensor; see core's base class."""
        variables: dict[str, Any] = super().initialize_quantization(tensor_shape, name, layer)
        self.built = True
        return variables

    def get_trainable_variables(self, group: VariableGroup) -> list[keras.Variable]:
        """Return the variables of one group that an optimizer may change; none when frozen."""
        variables = (self.get_quantizer_variable(name) for name, of in self._variable_groups.items() if of is group)
        return [variable for variable in variables if variable.trainable]

    def to_numpy(self, variable: keras.Variable) -> NDArray[Any]:
        """Return a variable's value."""
        return to_numpy(variable)

    def assign(self, variable: keras.Variable, value: NDArray[Any]) -> None:
        """Set a variable, in place."""
        variable.assign(value)

    # ---- layer life -------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: `initialize_quantization` makes the variables."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from; JSON-clean; see core's base class."""
        return {**BaseTrainableQuantizer.get_config(self), "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseKerasTrainableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on; see core's base class."""
        # by name: Keras's layer, which comes first, has a `from_config` of its own
        quantizer: BaseKerasTrainableQuantizer = BaseTrainableQuantizer.from_config.__func__(cls, config)  # type: ignore[attr-defined] # a class method's function
        if "name" in config:
            quantizer.name = config["name"]
        return quantizer

    def save_own_variables(self, store: Any) -> None:
        """Write the variables, and the sign where calibration decides it."""
        for variable in self._own_variables():
            store[variable.name] = to_numpy(variable)
        if self.stores_sign:
            store[SIGNED] = np.asarray(self.signed)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote.

        Raises
        ------
        QuantizerStateError
            When a variable is missing or unknown.
        """
        own = {variable.name: variable for variable in self._own_variables()}
        expected = {*own, SIGNED} if self.stores_sign else set(own)
        if set(store.keys()) != expected:
            raise QuantizerStateError(
                self.subject, f"the file has the variables {sorted(store.keys())}, needed {sorted(expected)}"
            )
        for name, variable in own.items():
            variable.assign(store[name])
        if self.stores_sign:
            self.signed = bool(np.asarray(store[SIGNED]))
        grid = [variable for width in self.widths for variable in self.grid_variables(width).values()] if own else []
        self.calibrated = bool(grid) and not any(np.isnan(self.to_numpy(variable)).all() for variable in grid)

    def _own_variables(self) -> list[keras.Variable]:
        return list(self.variables)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by config and variables: Keras would look the class up among its custom objects."""
        state: dict[str, Any] = {}
        self.save_own_variables(state)
        document = self.get_config()
        values = {name: self.to_numpy(self.get_quantizer_variable(name)) for name in self.variable_names}
        return _rebuilt, (type(self), {**document, "variables": {}}, values, state, self.subject, self.trainable)


def _rebuilt(
    cls: type[BaseKerasTrainableQuantizer],
    document: dict[str, Any],
    values: dict[str, Any],
    state: dict[str, Any],
    subject: str,
    trainable: bool,  # noqa: FBT001 - pickle calls it by position
) -> BaseKerasTrainableQuantizer:
    """Return the quantizer that `__reduce__` took apart; it may be uncalibrated, or not initialized."""
    quantizer = cls.from_config(document)
    quantizer.subject = subject
    if values:
        quantizer._restore(values, document["tensor_ndim"])  # noqa: SLF001 - ours
        quantizer.load_own_variables(state)
    quantizer.trainable = trainable
    return quantizer
