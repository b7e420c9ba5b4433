"""The quantizers of Keras 3: what `trainable_keras.quantizers` defines, as layers of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer
from numpy.typing import NDArray

from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.config import TrainableQuantizerConfig
from trainable_core.enums import QuantizationMethod
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras.keras3 import granularity
from trainable_keras.keras3.annealing import KerasLinearAnnealingScheduler, value_at
from trainable_keras.keras3.engine import Tensor, errors_as_they_are, foreign_tensorflow, infers_shapes
from trainable_keras.keras3.functions import FUNCTIONS
from trainable_keras.keras3.grid import GRIDS, Grid
from trainable_keras.keras3.ops import OPS
from trainable_keras.ops import BELOW_HALF
from trainable_keras.quantizers import KerasQuantizer, classes_for
from trainable_keras.quantizers.base import by_name


class BaseKerasTrainableQuantizer(
    KerasQuantizer,
    keras.layers.Layer,  # type: ignore[misc] # keras is untyped
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
    input's dtype. NaN inputs stay NaN, infinities saturate. Ties go up, as in TensorFlow's kernels.
    """

    backend: ClassVar[str] = "keras"
    estimated_by = ("fake_quantize", "quantized", "call", "__call__")
    functions, ops, grids = FUNCTIONS, OPS, GRIDS
    scheduler = KerasLinearAnnealingScheduler
    value_at = staticmethod(value_at)
    inferable_class = staticmethod(granularity.class_of)
    sign_is_a_variable = False
    variable_type = keras.Variable

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        keras.layers.Layer.__init__(self, dtype="float32", autocast=False)
        self.supports_masking = True
        self.learned: list[str] = []
        BaseTrainableQuantizer.__init__(self, quantization_config, freeze_quant_params)

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
                self.check_input(inputs)
            tensorflow = foreign_tensorflow(inputs)  # no assignment expression: AutoGraph can't read one
            if tensorflow is not None:
                return self._in_graph_of(tensorflow, inputs, bool(training))
        return super().__call__(inputs, training=training, **kwargs)

    def _in_graph_of(self, tf: Any, inputs: Any, training: bool) -> Any:  # noqa: FBT001 - mctq's word
        """Return what a method written with TensorFlow's functions makes of a tensor in one of TensorFlow's graphs.

        Such a graph has no tensors of another engine, so the grid's numbers are constants in it.
        """
        numbers = self.current_qparams().along(len(inputs.shape))
        centered = self.quantization_config.quantization_method is not QuantizationMethod.UNIFORM
        scale, zero_point = np.float32(numbers.scale), np.float32(numbers.zero_point)
        grid = Grid(scale, zero_point, numbers.quant_min, numbers.quant_max, centered)
        x = tf.cast(inputs, tf.float32)
        below = tf.bitcast(tf.bitcast(x, tf.int32) - 1, tf.float32)
        x = tf.where(tf.equal(x * (np.float32(1) / scale), BELOW_HALF), below, x)  # as `HalfUp.off_the_edge` does
        return tf.cast(self.fake_quantize(x, grid, training), inputs.dtype)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return the input fake-quantized, in its own dtype.

        Parameters
        ----------
        inputs : Tensor, any shape and floating dtype
            What to quantize.
        training : bool, optional
            Whether the model trains; by default what Keras says.
        """
        x = ops.cast(inputs, "float32")
        if training and self.has_schedule:
            self.advance()
        quantized = self.values_and_terms(x, bool(training))
        return ops.cast(quantized, keras.backend.standardize_dtype(inputs.dtype))

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002, FBT001 - Keras's signature
        """Return the input's own shape and dtype: a symbolic call works before calibration."""
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        super().freeze(frozen)
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

    # ---- variables --------------------------------------------------------------------------------------------------

    def new_variable(self, name: str, value: NDArray[Any], *, trainable: bool) -> keras.Variable:
        """Return a new variable of the layer with this value, its shape and its dtype."""
        created = self.add_weight(
            name=name,
            shape=value.shape,
            dtype=value.dtype.name,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(value),  # noqa: ARG005 - Keras's signature
            trainable=trainable,
            autocast=False,
            aggregation="none" if trainable else "only_first_replica",
        )
        if trainable:
            self.learned.append(name)
            created.trainable = self.trainable and not self.freeze_quant_params
        return created

    def adopt(self, name: str, variable: keras.Variable) -> None:
        """Keep a variable that somebody else made; it learns if it is trainable, and as long as nothing is frozen."""
        super().adopt(name, variable)
        if variable.trainable:
            self.learned.append(name)
            variable.trainable = self.trainable and not self.freeze_quant_params

    def all_variables(self) -> dict[str, keras.Variable]:
        """Return all variables of the layer by name."""
        return by_name((variable.name, variable) for variable in self.variables)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Create the variables for a tensor; see core's base class."""
        variables: dict[str, Any] = super().initialize_quantization(tensor_shape, name, layer)
        self.built = True
        return variables

    def build(self, input_shape: Any = None) -> None:
        """Do nothing: `initialize_quantization` makes the variables."""

    # ---- copies -----------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from; JSON-clean; see core's base class."""
        return {**super().get_config(), "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseKerasTrainableQuantizer:
        """Return a quantizer equal to the one that `get_config` was called on; see core's base class."""
        quantizer: BaseKerasTrainableQuantizer = super().from_config(config)
        if "name" in config:
            quantizer.name = config["name"]
        return quantizer

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
        quantizer._restore(values, document["tensor_ndim"], document.get("tensor_shape"))  # noqa: SLF001 - ours
        quantizer.load_own_variables(state)
    quantizer.trainable = trainable
    return quantizer


_CLASSES = classes_for(BaseKerasTrainableQuantizer)
globals().update(_CLASSES)  # so that each is found by its name, as pickle does

BUILTIN: tuple[type[BaseKerasTrainableQuantizer], ...] = tuple(_CLASSES.values())
"""What the plugin registers."""
