"""The base of every Keras 2 quantizer: a layer that owns its variables; the rest is core's.

A training method subclasses it and writes `fake_quantize`. Everything else has a default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray

from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, VariableGroup
from trainable_core.errors import QuantizerStateError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras2 import grid as grids
from trainable_keras.keras2 import inferable
from trainable_keras.keras2.engine import Tensor, choose, keras, plainly, read, to_numpy, unconverted, untracked
from trainable_keras.keras2.grid import Grid


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
    input's dtype. NaN inputs stay NaN, infinities saturate. Ties go up, as in TensorFlow's kernels. Where calibration
    decides the sign, it is a variable too, so that every format Keras has keeps it.
    """

    backend: ClassVar[str] = "tf_keras"

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False)
        self.supports_masking = True
        with untracked(self):
            self._sign: Any = None
            self._has_numbers = False
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
        """Return `x` fake-quantized on the selected width's grid; a method that mixes widths overrides it."""
        return self.fake_quantize(x, self.grid(x.shape.rank), training)

    def __call__(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        """Return the input fake-quantized; see `call`.

        Raises
        ------
        QuantizerStateError
            Before calibration.
        """
        return super().__call__(inputs, training=training, **kwargs) if self.quantization_config.enabled else inputs

    def call(self, inputs: Tensor, training: Any = None) -> Tensor:
        """Return the input fake-quantized, in its own dtype.

        Parameters
        ----------
        inputs : Tensor, any shape and floating dtype
            What to quantize.
        training : bool or Tensor, optional
            Whether the model trains; by default what Keras says.
        """
        return self._call(inputs, training)

    @unconverted
    def _call(self, inputs: Tensor, training: Any) -> Tensor:
        if not self.calibrated:
            if _only_shapes():
                return tf.identity(inputs)
            try:
                self.require_calibrated()
            except QuantizerStateError as error:
                raise plainly(error)  # noqa: B904 - the same error
        x = tf.cast(inputs, tf.float32)
        return tf.cast(choose(training, lambda trains: self._run(x, trains)), inputs.dtype)

    def _run(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's word
        if training:
            term = self.regularization()
            if term is not None:
                self.add_loss(term)
        return self.quantized(x, training)

    def grid(self, ndim: int, width: int | None = None) -> Grid:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        config = self.quantization_config
        width = self.selected_width if width is None else width
        variables = {key: read(variable) for key, variable in self.grid_variables(width).items()}
        if config.channels_axis is not None:
            shape = [1] * ndim
            shape[config.channels_axis] = -1
            variables = {key: tf.reshape(variable, shape) for key, variable in variables.items()}
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

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the config switches quantization off.
        """
        config = self.quantization_config
        if not config.enabled:
            raise QuantizerStateError(self.subject, "its config switches quantization off; there is nothing to deploy")
        self.require_calibrated()
        width = self.selected_width
        qparams = self.current_qparams(width)
        return inferable.build(config.target, config.quantization_method, width, qparams, self.tensor_ndim)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen

    @property
    def trainable_weights(self) -> list[Any]:
        """Variables that an optimizer may change; none when frozen."""
        return [] if self.freeze_quant_params else list(super().trainable_weights)

    @property
    def non_trainable_weights(self) -> list[Any]:
        """The other variables."""
        if self.freeze_quant_params:
            return [*self._trainable_weights, *self._non_trainable_weights]
        return list(super().non_trainable_weights)

    # ---- what a saved or loaded variable tells ----------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer has its numbers, however they came into its variables."""
        if not self._has_numbers and self.variable_names:
            grid = [variable for width in self.widths for variable in self.grid_variables(width).values()]
            with untracked(self):
                self._has_numbers = not any(np.isnan(to_numpy(variable)).all() for variable in grid)
        return bool(self._has_numbers)

    @calibrated.setter
    def calibrated(self, value: bool) -> None:
        with untracked(self):
            self._has_numbers = value

    @property
    def signed(self) -> bool:
        """Whether a symmetric grid reaches below zero."""
        return bool(self._signed) if self._sign is None else bool(to_numpy(self._sign))

    @signed.setter
    def signed(self, value: bool) -> None:
        with untracked(self):
            self._signed = bool(value)
        if self._sign is not None:
            self._sign.assign(float(value))

    # ---- the primitives core asks for -------------------------------------------------------------------------------

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 variable; see core's base class."""
        learns = self.learns_grid if trained is None else trained
        setattr(self, name, self._variable_of(name, np.asarray(variable, np.float32), "float32", trainable=learns))
        self._variable_groups[name] = group

    def _variable_of(self, name: str, value: NDArray[Any], dtype: str, *, trainable: bool) -> Any:
        """Return a new variable; its name is unlike every other layer's, as the HDF5 format wants it."""
        return self.add_weight(
            name=f"{self.name}/{name}",
            shape=value.shape,
            dtype=dtype,
            initializer=keras.initializers.Constant(value),
            trainable=trainable,
            aggregation=tf.VariableAggregation.MEAN if trainable else tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the variables for a tensor; see core's base class."""
        with tf.init_scope():
            variables: dict[str, Any] = super().initialize_quantization(tensor_shape, name, layer)
            if self.stores_sign and self._sign is None:
                self._sign = self._variable_of(SIGNED, np.asarray(self._signed, np.float32), "float32", trainable=False)
        self.built = True
        return variables

    def get_trainable_variables(self, group: VariableGroup) -> list[Any]:
        """Return the variables of one group that an optimizer may change; none when frozen."""
        trained = {id(variable) for variable in self.trainable_weights}
        variables = (self.get_quantizer_variable(name) for name, of in self._variable_groups.items() if of is group)
        return [variable for variable in variables if id(variable) in trained]

    def to_numpy(self, variable: Any) -> NDArray[Any]:
        """Return a variable's value."""
        return to_numpy(variable)

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Set a variable, in place."""
        variable.assign(value)

    # ---- layer life -------------------------------------------------------------------------------------------------

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from; JSON-clean; see core's base class."""
        return BaseTrainableQuantizer.get_config(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseKerasTrainableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on; see core's base class."""
        quantizer: BaseKerasTrainableQuantizer = BaseTrainableQuantizer.from_config.__func__(cls, config)  # type: ignore[attr-defined] # past Keras's own
        return quantizer

    def save_own_variables(self, store: Any) -> None:
        """Write the variables by their names."""
        for variable in self._own_variables():
            store[_short(variable)] = to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote.

        Raises
        ------
        QuantizerStateError
            When a variable is missing or unknown.
        """
        own = {_short(variable): variable for variable in self._own_variables()}
        if set(store.keys()) != set(own):
            raise QuantizerStateError(
                self.subject, f"the file has the variables {sorted(store.keys())}, needed {sorted(own)}"
            )
        for name, variable in own.items():
            variable.assign(np.asarray(store[name]))
        self.calibrated = False  # asks the variables again

    def _own_variables(self) -> list[Any]:
        return [*self._trainable_weights, *self._non_trainable_weights]


def _short(variable: Any) -> str:
    """Return a variable's name without its layer's."""
    return str(variable.name).rpartition("/")[2].partition(":")[0]


def _only_shapes() -> bool:
    """Return whether Keras only asks for shapes: it traces into a scratch graph then, to be thrown away."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        name = str(getattr(graph, "name", ""))
        if name.endswith("_scratch_graph") or name in {"build_graph", "keras_graph"}:
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def count_step(quantizers: Iterable[Any], training: Any) -> None:
    """Count one training step in quantizers with a schedule, before their call."""
    scheduled = [
        each
        for each in quantizers
        if isinstance(each, BaseKerasTrainableQuantizer)
        and type(each).advance is not BaseTrainableQuantizer.advance
        and each.quantization_config.enabled
    ]
    if not scheduled or _only_shapes():
        return

    def count(trains: bool) -> Tensor:  # noqa: FBT001 - as `choose` calls it
        for each in scheduled if trains else []:
            each.advance()
        return tf.constant(0)

    choose(training, count)
