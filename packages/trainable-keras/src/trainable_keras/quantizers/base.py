"""What a quantizer of either Keras is beside a layer; `keras2.quantizers` and `keras3.quantizers` add the layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.errors import InvalidArgumentError, QuantizerStateError, ShapeMismatchError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.schedule import AnnealingScheduler
from trainable_keras import granularity
from trainable_keras.functions import Functions, Tensor
from trainable_keras.grid import Grid, GridMaker
from trainable_keras.inferable import KerasInferableQuantizer
from trainable_keras.ops import HalfUp

LAST_STEP = int(np.iinfo(np.int32).max)

BUILT_IN = "trainable_keras.quantizers."
"""Beginning of the names of modules whose methods take their values from `HalfUp`, and set none of their variables."""

_READ: ContextVar[dict[int, Tensor] | None] = ContextVar("read", default=None)
"""Values of the variables that the present call of a quantizer has read, by the variables' `id`; see `reading_once`."""


def by_name(variables: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return variables by their names, with a number where several have the same one, as seed generators have."""
    found: dict[str, Any] = {}
    for name, variable in variables:
        names = (name if number == 0 else f"{name}_{number}" for number in itertools.count())
        found[next(each for each in names if each not in found)] = variable
    return found


class KerasQuantizer(BaseTrainableQuantizer):
    """Base of the training methods: a method subclasses it, writes `fake_quantize`, and serves both Kerases.

    It is no layer. Each Keras's `BaseKerasTrainableQuantizer` is one, and inherits this class; `quantizers.classes_for`
    joins it with a method.
    """

    if TYPE_CHECKING:
        estimated_by: ClassVar[tuple[str, ...]]
        """Methods one of which a training method writes."""

    functions: ClassVar[Functions]
    """What the framework does with tensors."""

    ops: ClassVar[HalfUp]
    """Fake quantization on the framework's tensors."""

    grids: ClassVar[GridMaker[Any]]
    """Makes grids of the framework's tensors."""

    sign_is_a_variable: ClassVar[bool]
    """Whether the sign, where calibration decides it, is among the layer's variables."""

    step: Any
    """Number of training steps counted so far, an int32 variable; where the class says `counts_steps`."""

    if TYPE_CHECKING:

        @property
        def trainable_weights(self) -> list[Any]:
            """The layer's variables that an optimizer may change."""

        def add_loss(self, loss: Tensor) -> None:
            """Add a term to the layer's losses."""

    # ---- what a training method writes ------------------------------------------------------------------------------

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

        It is not called ``quantize``: every layer of Keras 3 has a method of that name, for post-training quantization.
        """
        grid = self.grid(self.functions.rank(x))
        if not type(self).fake_quantize.__module__.startswith(BUILT_IN):  # it may round as it likes
            x = self.ops.off_the_edge(x, self.functions.stop_gradient(grid.scale))
        return self.functions.show_shape(self.fake_quantize(x, grid, training), x)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return `x` with a row for each block that has a scale of its own, if some have."""
        blocks = self.quantization_config.blocks
        return x if blocks is None else granularity.rows_of(self.functions, x, blocks)

    def quantized_by_blocks(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return what the quantizer makes of a float32 tensor, whether or not it is quantized by blocks."""
        blocks = self.quantization_config.blocks
        if blocks is None:
            return self.modified_values(x, training)
        rows = self.modified_values(self.laid_out(x), training)
        return granularity.tensor_of(self.functions, rows, blocks, tuple(x.shape))

    def modified_values(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return what the method, and the modifiers that change values, make of a float32 tensor; see `laid_out`."""
        if not self.modified:
            return self.quantized(x, training)
        entered = x
        for modifier in self.modifiers:
            entered = modifier.enter(self, entered, training)
        quantized = self.quantized(entered, training)
        for modifier in self.modifiers:
            quantized = modifier.leave(self, x, quantized, training)
        return quantized

    def values_and_terms(self, x: Tensor, training: bool) -> Tensor:  # noqa: FBT001 - mctq's call
        """Return what the quantizer makes of a float32 tensor; in training, its terms join the layer's losses."""
        with self.reading_once():
            if training:
                if self.weights_quantization():
                    self.observe(x)
                for term in (self.regularization(), self.regularization_of(x)):
                    if term is not None:
                        self.add_loss(term)
            return self.quantized_by_blocks(x, training)

    @contextmanager
    def reading_once(self) -> Iterator[None]:
        """Let everything in one call, values and terms for the loss, see the same tensor of each variable.

        TensorFlow's graphs run a read before the update that follows it in the program by an edge between the two.
        Grappler drops that edge where the update also comes after the read by way of the loss, and then folds the
        derivative of the loss by itself, a constant, which that way led through. The term of a modifier that read a
        threshold by itself could so see the updated one. What the values read, the threshold's gradient is made of, and
        so the update can't run before.

        A method of somebody else's may set its variables in the call, and reads them each time.
        """
        if not self.modifiers or not type(self).fake_quantize.__module__.startswith(BUILT_IN):
            yield
            return
        token = _READ.set({})
        try:
            yield
        finally:
            _READ.reset(token)

    def _value_of(self, variable: Any) -> Tensor:
        """Return a variable's value as a tensor, within `reading_once` the same one each time."""
        read = _READ.get()
        if read is None:
            return self.functions.read(variable)
        if id(variable) not in read:
            read[id(variable)] = self.functions.read(variable)
        return read[id(variable)]

    variable_type: ClassVar[Any]
    """The framework's variables."""

    def adopt(self, name: str, variable: Any) -> None:
        """Keep a variable that somebody else made."""
        setattr(self, name, variable)

    # ---- what each Keras writes -------------------------------------------------------------------------------------

    def new_variable(self, name: str, value: NDArray[Any], *, trainable: bool) -> Any:
        """Return a new variable of the layer with this value, its shape and its dtype."""
        raise NotImplementedError

    def all_variables(self) -> dict[str, Any]:
        """Return all variables of the layer by name, those of a method's state included."""
        raise NotImplementedError

    @staticmethod
    def value_at(schedule: AnnealingScheduler, t: Tensor) -> Tensor:
        """Return the value of a schedule at a step that is a tensor."""
        raise NotImplementedError

    @staticmethod
    def inferable_class(
        target: QuantizationTarget, method: QuantizationMethod, kind: str = ""
    ) -> type[KerasInferableQuantizer]:
        """Return the class of deployed quantizers of a target and a grid, or one of those that mctq lacks."""
        raise NotImplementedError

    # ---- the grid, and what is deployed -----------------------------------------------------------------------------

    def grid(self, ndim: int | None, width: int | None = None) -> Any:
        """Return the grid of one width (default: the selected one) for a tensor of `ndim` dimensions."""
        width = self.selected_width if width is None else width
        return self.grid_of(self.grid_tensors(width), ndim, width)

    def grid_of(self, numbers: Mapping[str, Tensor], ndim: int | None, width: int | None = None) -> Any:
        """Return the grid of a threshold or a range that the method computed itself, for a tensor of `ndim` dimensions.

        Parameters
        ----------
        numbers : mapping of str to Tensor
            ``threshold``, or ``range_min`` and ``range_max``: one number per tensor or per channel, as the quantizer's
            variables have. They are bounded here; gradients reach them through the grid.
        ndim : int
            Number of dimensions of the tensor that is to be fake-quantized.
        width : int, optional
            Bit width; by default the selected one.
        """
        config = self.quantization_config
        width = self.selected_width if width is None else width
        shaped = {key: self._shaped(number, ndim) for key, number in numbers.items()}
        low = config.min_threshold
        if config.quantization_method is QuantizationMethod.UNIFORM:
            return self.grids.uniform(shaped[RANGE_MIN], shaped[RANGE_MAX], width, min_threshold=low)
        threshold = shaped[THRESHOLD]
        if config.quantization_method in LUT_METHODS:  # codes of 8 bits, of which a table keeps some
            power_of_two = config.quantization_method is QuantizationMethod.LUT_POT_QUANTIZER
            return self.grids.symmetric(threshold, 8, signed=self.signed, power_of_two=power_of_two, min_threshold=low)
        power_of_two = config.quantization_method is QuantizationMethod.POWER_OF_TWO
        return self.grids.symmetric(threshold, width, signed=self.signed, power_of_two=power_of_two, min_threshold=low)

    def grid_tensors(self, width: int) -> dict[str, Tensor]:
        """Return threshold or range ends of one width as tensors; see core's base class."""
        variables = {key: self._value_of(variable) for key, variable in self.grid_variables(width).items()}
        if not self.grid_parameters:
            return variables
        finite = self.ops.finite_gradient
        return self.decode_grid({key: finite(variable) for key, variable in variables.items()})

    def read_variable(self, name: str, ndim: int | None = None) -> Tensor:
        """Return a variable's value, shaped for a tensor of `ndim` dimensions where that is given; see core's class."""
        value = self._value_of(self.get_quantizer_variable(name))
        return value if ndim is None or tuple(value.shape) != self.structure.shape else self._shaped(value, ndim)

    def _shaped(self, value: Tensor, ndim: int | None) -> Tensor:
        axis = self.quantization_config.channels_axis
        if axis is None:
            return value
        assert ndim is not None  # noqa: S101 - weights have a shape, and activations no channels
        shape = [1] * ndim
        shape[axis] = -1
        return self.functions.reshape(value, shape)

    # ---- a schedule's step ------------------------------------------------------------------------------------------

    @property
    def current_step(self) -> Tensor:
        """Number of the present training step, counted from 0, for a `scheduler`; an int32 tensor.

        A call in training mode is counted before its values are computed: the first one is step 0.
        """
        return self.functions.maximum(self.functions.read(self.step) - 1, 0)

    def add_step(self) -> None:
        """Create the variable ``step``; see core's base class."""
        self.step = self.new_variable("step", np.zeros((), np.int32), trainable=False)

    def count_step(self) -> None:
        """Add one to the variable ``step``; see core's base class."""
        self.step.assign_add(1)

    @property
    def counted_steps(self) -> int:
        """Number of training steps counted so far; see core's base class."""
        return int(self.to_numpy(self.step)) if self.counts_steps and self.variable_names else 0

    @counted_steps.setter
    def counted_steps(self, count: int) -> None:
        self.step.assign(count)

    def annealed(self, schedule: AnnealingScheduler | float) -> Tensor | float:
        """Return the value of a schedule at the present training step, a float32 tensor; a number as it is."""
        if not isinstance(schedule, AnnealingScheduler):
            return schedule
        return self.functions.cast(self.value_at(schedule, self.current_step), "float32")

    def add_state(self, name: str, value: NDArray[Any]) -> None:
        """Keep a float32 variable that does not learn; see core's base class."""
        setattr(self, name, self.new_variable(name, np.asarray(value, np.float32), trainable=False))

    def state(self, name: str) -> Tensor:
        """Return the value of what `add_state` keeps, outside of the graph."""
        return self.functions.stop_gradient(self.functions.read(getattr(self, name)))

    def set_state(self, name: str, value: Tensor) -> None:
        """Set what `add_state` keeps."""
        getattr(self, name).assign(self.functions.stop_gradient(value))

    def until(self, end: int, soft: Tensor, deployed: Tensor) -> Tensor:
        """Return `soft` in the training steps before `end` steps are counted, and `deployed` from then on.

        Parameters
        ----------
        end : int
            What the class gives as ``schedule_end``.
        soft, deployed : Tensor
            Values in training, of one shape; the gradient comes from the one that is returned.
        """
        return self.functions.where(self.functions.read(self.step) >= min(end, LAST_STEP), deployed, soft)

    def check_input(self, inputs: Any) -> None:
        """Raise ShapeMismatchError for what is not a floating tensor, or has another number of channels."""
        dtype = getattr(inputs, "dtype", None)
        if "float" not in str(getattr(dtype, "name", dtype)):
            raise ShapeMismatchError(self.subject, "a floating tensor", dtype or type(inputs).__name__)
        axis, rank = self.quantization_config.channels_axis, self.functions.rank(inputs)
        if axis is None or rank is None:
            return
        (channels,), shape = self.structure.shape, tuple(inputs.shape)
        blocks = self.quantization_config.blocks
        if blocks is not None:
            found = math.prod(blocks.counts(shape, self.subject))
            if found != channels:
                expected = f"{channels} blocks with a scale each"
                raise ShapeMismatchError(self.subject, expected, f"{found} in shape {shape}")
            return
        if not -rank <= axis < rank or shape[axis] not in {channels, None}:  # None: not known before a graph runs
            raise ShapeMismatchError(self.subject, f"{channels} channels along axis {axis}", f"shape {shape}")

    def convert2inferable(self) -> Any:
        """Return the inferable quantizer with the trained numbers; this quantizer goes on as it is.

        On TensorFlow it is an instance of mctq's class, except where mctq has no form for the granularity.

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the config switches quantization off.
        """
        config = self.quantization_config
        self.require_deployable()
        width = self.selected_width
        if config.blocks is not None:
            make: Any = self.inferable_class(config.target, config.quantization_method, granularity.BLOCKS)
            return make(self.current_qparams(width), width, config.blocks)
        make = self.inferable_class(config.target, config.quantization_method)
        return make(self.deployed_qparams(), width, self.tensor_ndim)

    def freeze(self, frozen: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a fact
        """Stop the quantizer's variables from learning, or let them learn again."""
        self.freeze_quant_params = frozen

    # ---- the primitives that core asks for --------------------------------------------------------------------------

    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 variable; see core's base class.

        A variable of Keras, such as one that ``layer.add_weight`` returned, is kept as the object it is, and learns if
        it is trainable.

        Raises
        ------
        InvalidArgumentError
            When the name is that of another attribute, or a variable has another dtype.
        """
        if name not in self._variable_groups and hasattr(self, name):
            problem = "the quantizer has another attribute of that name"
            raise InvalidArgumentError(f"{self.subject}: variable {name!r}", problem)
        if isinstance(variable, self.variable_type):
            dtype = getattr(variable.dtype, "name", variable.dtype)
            if dtype != "float32":
                problem = f"a variable of {dtype} would have to be copied"
                raise InvalidArgumentError(f"{self.subject}: variable {name!r}", problem, "make it float32.")
            self.adopt(name, variable)
        else:
            learns = self.learns_grid if trained is None else trained
            setattr(self, name, self.new_variable(name, np.asarray(variable, np.float32), trainable=learns))
        self._variable_groups[name] = group

    def get_trainable_variables(self, group: VariableGroup) -> list[Any]:
        """Return the variables of one group that an optimizer may change; none when frozen."""
        trained = {id(variable) for variable in self.trainable_weights}
        variables = (self.get_quantizer_variable(name) for name, of in self._variable_groups.items() if of is group)
        return [variable for variable in variables if id(variable) in trained]

    def to_numpy(self, variable: Any) -> NDArray[Any]:
        """Return a variable's value."""
        return self.functions.to_numpy(variable)

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Set a variable, in place."""
        variable.assign(value)

    # ---- saved variables --------------------------------------------------------------------------------------------

    def has_numbers(self) -> bool:
        """Return whether the grid's variables have values, however they came into them."""
        if self.computes_grid:
            return bool(self.structure.widths)
        if not self.variable_names:
            return False
        grid = [variable for width in self.structure.widths for variable in self.grid_variables(width).values()]
        return not any(np.isnan(self.to_numpy(variable)).all() for variable in grid)

    def save_own_variables(self, store: Any) -> None:
        """Write the variables by their names, and the sign where calibration decides it."""
        for name, variable in self.all_variables().items():
            store[name] = self.to_numpy(variable)
        if self.stores_sign and not self.sign_is_a_variable:
            store[SIGNED] = np.asarray(self.signed)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote.

        Raises
        ------
        QuantizerStateError
            When a variable is missing or unknown.
        """
        own = self.all_variables()
        separate_sign = self.stores_sign and not self.sign_is_a_variable
        expected = {*own, SIGNED} if separate_sign else set(own)
        if set(store.keys()) != expected:
            raise QuantizerStateError(
                self.subject, f"the file has the variables {sorted(store.keys())}, needed {sorted(expected)}"
            )
        for name, variable in own.items():
            variable.assign(np.asarray(store[name]))
        if separate_sign:
            self.signed = bool(np.asarray(store[SIGNED]))
        self.calibrated = self.has_numbers()
