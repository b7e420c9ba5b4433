"""The quantizers of Keras 2: what `trainable_keras.quantizers` defines, as layers of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.config import TrainableQuantizerConfig
from trainable_core.constants import SIGNED
from trainable_core.errors import QuantizerStateError, ShapeMismatchError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras2 import granularity
from trainable_keras.keras2.annealing import KerasLinearAnnealingScheduler, value_at
from trainable_keras.keras2.engine import Tensor, choose, keras, plainly, short_name, to_numpy, unconverted, untracked
from trainable_keras.keras2.functions import FUNCTIONS
from trainable_keras.keras2.grid import GRIDS
from trainable_keras.keras2.ops import OPS
from trainable_keras.quantizers import KerasQuantizer, classes_for
from trainable_keras.quantizers.base import by_name


class BaseKerasTrainableQuantizer(
    KerasQuantizer,
    keras.layers.Layer,  # type: ignore[misc] # TensorFlow is untyped
    metaclass=UnlistedSubclass,
    of=BaseInferableQuantizer,
):
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
    estimated_by = ("fake_quantize", "quantized", "call", "__call__")
    functions, ops, grids = FUNCTIONS, OPS, GRIDS
    scheduler = KerasLinearAnnealingScheduler
    value_at = staticmethod(value_at)
    inferable_class = staticmethod(granularity.class_of)
    sign_is_a_variable = True
    variable_type = tf.Variable

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False)
        self.supports_masking = True
        with untracked(self):
            self._sign: Any = None
            self._has_numbers = False
            BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)

    def __call__(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        """Return the input fake-quantized; see `call`.

        Raises
        ------
        QuantizerStateError
            Before calibration.
        ShapeMismatchError
            When the input is no floating tensor, or has another number of channels than the quantizer.
        """
        if not self.quantization_config.enabled:
            return inputs
        if self.calibrated:  # if not, that is what is said first, and not while Keras only asks for shapes
            try:
                self.check_input(inputs)
            except ShapeMismatchError as error:
                raise plainly(error)  # noqa: B904 - the same error
        return super().__call__(inputs, training=training, **kwargs)

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
        return tf.cast(choose(training, lambda trains: self.values_and_terms(x, trains)), inputs.dtype)

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
        if not self._has_numbers:
            self.calibrated = self.has_numbers()
        return bool(self._has_numbers) or self.deploys_itself

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

    # ---- variables --------------------------------------------------------------------------------------------------

    def new_variable(self, name: str, value: NDArray[Any], *, trainable: bool) -> Any:
        """Return a new variable of the layer; its name is unlike every other layer's, as the HDF5 format wants it."""
        return self.add_weight(
            name=f"{self.name}/{name}",
            shape=value.shape,
            dtype=value.dtype.name,
            initializer=keras.initializers.Constant(value),
            trainable=trainable,
            aggregation=tf.VariableAggregation.MEAN if trainable else tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def all_variables(self) -> dict[str, Any]:
        """Return all variables of the layer by name, without the layer's."""
        own = [*self._trainable_weights, *self._non_trainable_weights]
        return by_name((short_name(variable), variable) for variable in own)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the variables for a tensor; see core's base class."""
        with tf.init_scope():
            variables: dict[str, Any] = super().initialize_quantization(tensor_shape, name, layer)
            if self.stores_sign and self._sign is None:
                self._sign = self.new_variable(SIGNED, np.asarray(self._signed, np.float32), trainable=False)
        self.built = True
        return variables

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's own shape."""
        return input_shape


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
        and each.has_schedule
        and each.quantization_config.enabled
        and each.calibrated  # if not, its call is refused, and nothing is to have changed
    ]
    if not scheduled or _only_shapes():
        return

    def count(trains: bool) -> Tensor:  # noqa: FBT001 - as `choose` calls it
        for each in scheduled if trains else []:
            each.advance()
        return tf.constant(0)

    choose(training, count)


_CLASSES = classes_for(BaseKerasTrainableQuantizer)
globals().update(_CLASSES)  # so that each is found by its name, as pickle does

BUILTIN: tuple[type[BaseKerasTrainableQuantizer], ...] = tuple(_CLASSES.values())
"""What the plugin registers."""
