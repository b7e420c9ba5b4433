"""What every trainable quantizer is, before any framework: its key, its config, its variables."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainable_core import qparams
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerConfig,
    TrainableQuantizerWeightsConfig,
    config_document,
    config_from_document,
)
from trainable_core.constants import LUT_VALUES, RANGE_MIN, SIGNED
from trainable_core.enums import QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.errors import (
    InvalidArgumentError,
    QuantizerStateError,
    ShapeMismatchError,
    UnsupportedConfigError,
    nearest,
)
from trainable_core.key import identifier_text
from trainable_core.modifier import Modifier
from trainable_core.reference.method import DECLARED, Dependence, Method, OwnVariable, TrainingForward, own_variable
from trainable_core.registry.marks import marks_of
from trainable_core.registry.process import get_modifier_class
from trainable_core.schedule import LinearAnnealingScheduler
from trainable_core.validation import check_params, plain

Q = TypeVar("Q", bound="BaseTrainableQuantizer")

_PACKAGES = ("trainable_core", "trainable_torch", "trainable_keras")
"""Where the base classes are."""


@dataclass(frozen=True)
class Structure:
    """What `initialize_quantization` decides about a quantizer, and nothing changes afterwards.

    Parameters
    ----------
    widths : tuple of int
        Bit widths that the quantizer keeps a grid for.
    width : int or None
        The only one of them, or None where the method chooses among several.
    shape : tuple of int
        Shape of each variable of a grid: ``()`` per tensor, ``(C,)`` per channel.
    names : dict of int to tuple of str
        Names of the variables that each width's grid is made from, in the order of `qparams.variable_names`.
    """

    widths: tuple[int, ...] = ()
    width: int | None = None
    shape: tuple[int, ...] = ()
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)


class BaseTrainableQuantizer:
    """Framework-free part of every trainable quantizer: config, variables, calibration, conversion to numbers, JSON.

    A backend's base class adds the framework's module type and its primitives (`add_quantizer_variable`,
    `get_trainable_variables`, `read_variable`, `to_numpy`, `assign`, and those of a schedule's step); a method adds how
    a tensor is fake-quantized.

    Parameters
    ----------
    quantization_config : TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig
        What to quantize and how. mctq's enum members are accepted in it.
    freeze_quant_params : bool
        Whether the quantizer's own variables stay as they are while the model trains.

    Raises
    ------
    InvalidArgumentError
        When the first argument is not a config, or `freeze_quant_params` is not a bool.
    UnsupportedConfigError
        When the config is for the other target or for a method that the class is not marked with.

    Notes
    -----
    A method declares itself by class attributes: `declaration`, or `learns_grid` (thresholds and ranges become trained
    variables of the group QPARAMS), `grid_parameters` (other variables are trained in their place), `own_variables`,
    `training_forward`, `counts_steps` (a schedule), `depends_on`, `deploys_values`, `computes_grid` and
    `conformance_arguments`. It may override `widths` (several grids of different bit widths), `selected_width` and
    `select_width` (which of them is deployed), `add_variables` (variables that no declaration makes), `encode_grid` and
    `decode_grid`, `get_arguments`, `regularization` (a term for the loss) and `advance` (a schedule that counts in its
    own way). `widths` is asked once, when the quantizer is initialized; from then on `structure` has the answer.
    """

    backend: ClassVar[str]
    """Name of the backend the class belongs to; set by the backend's base class."""

    declaration: ClassVar[Method | None] = None
    """What a built-in's reference declares; sets the attributes below. A plugin may set them one by one."""

    learns_grid: ClassVar[bool] = False
    """Whether thresholds and ranges are trained."""

    grid_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the variables that stand for the threshold, or for the range, where others are trained in its place."""

    own_variables: ClassVar[tuple[str | OwnVariable, ...]] = ()
    """The variables that the method trains beside thresholds and ranges."""

    training_forward: ClassVar[TrainingForward] = "deployed"
    """Whether values in training are the deployed ones, soft (until `schedule_end` counted steps) or random."""

    counts_steps: ClassVar[bool] = False
    """Whether training steps are counted for a schedule, in the state variable ``step``."""

    depends_on: ClassVar[Dependence] = "element"
    """Whether an element's value depends on the element alone, on its channel, or on the whole tensor."""

    deploys_values: ClassVar[bool] = False
    """Whether finalizing stores the quantized values in the place of the float weights."""

    computes_grid: ClassVar[bool] = False
    """Whether the grid is computed from the tensor itself at every call: there are no thresholds to calibrate."""

    conformance_arguments: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Further arguments of the constructor that the conformance kit tries besides the defaults."""

    scheduler: ClassVar[type[LinearAnnealingScheduler]] = LinearAnnealingScheduler
    """Schedule whose step may be a tensor of the framework, such as `current_step`."""

    learns_levels: ClassVar[bool] = False
    """Whether the levels of a look-up table are variables: calibration finds them, and params may name others."""

    quantization_target: ClassVar[Any] = None
    quantization_method: ClassVar[Any] = None
    identifier: ClassVar[Any] = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Take over what the class's own declaration says."""
        super().__init_subclass__(**options)
        declared = vars(cls).get("declaration")
        if declared is not None:
            for name in DECLARED:
                setattr(cls, name, getattr(declared, name))

    numbers_set: Mapping[str, NDArray[np.float32]]
    """What calibration set the variables of the grids to, by their names; empty where this process has not seen it.

    It is copied with the quantizer, and is in no file.
    """

    def __init__(self, quantization_config: TrainableQuantizerConfig, freeze_quant_params: bool = False) -> None:  # noqa: FBT001, FBT002 - the seed's signature
        self._check_config(quantization_config)
        if not isinstance(freeze_quant_params, bool):
            problem = f"freeze_quant_params must be true or false, got {freeze_quant_params!r}"
            raise InvalidArgumentError(type(self).__name__, problem)
        self.quantization_config = quantization_config
        self.freeze_quant_params = freeze_quant_params
        self.subject = type(self).__name__
        self.signed = quantization_config.signed
        self._calibrated = False
        self.tensor_ndim = 0
        self.tensor_shape: tuple[int, ...] | None = None
        self.modifiers: tuple[Modifier, ...] = ()
        self.modified = False
        self.folded_grid: qparams.QParams | None = None
        self.structure = Structure()
        vars(self)["numbers_set"] = {}  # Keras would track it
        self._variable_groups: dict[str, VariableGroup] = {}

    @classmethod
    def _check_config(cls, config: TrainableQuantizerConfig) -> None:
        target, methods = marks_of(cls)
        if not isinstance(config, TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig):
            raise InvalidArgumentError(
                cls.__name__,
                f"the first argument must be a trainable quantizer config, got {type(config).__name__}",
                "build a TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig.",
            )
        if config.target is not target:
            raise UnsupportedConfigError(cls.__name__, f"it quantizes {target}, the config is for {config.target}")
        if config.quantization_method not in methods:
            offered = ", ".join(map(str, methods))
            raise UnsupportedConfigError(
                cls.__name__, f"quantization method {config.quantization_method} is not one of: {offered}"
            )
        if cls.computes_grid and config.calibrated:
            problem = "it computes its grid from the tensor itself, and the config has quantization params"
            raise UnsupportedConfigError(cls.__name__, problem, "leave them out; a sign alone may be given.")

    # ---- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def add_quantizer_variable(
        self, name: str, variable: Any, group: VariableGroup = VariableGroup.QPARAMS, *, trained: bool | None = None
    ) -> None:
        """Own a float32 tensor of the framework, found again as the attribute `name`.

        Parameters
        ----------
        name : str
            Attribute and state name.
        variable : array or tensor
            Initial value.
        group : VariableGroup
            Which optimizer group it belongs to.
        trained : bool, optional
            Whether it learns; by default what `learns_grid` says.
        """

    @abstractmethod
    def get_trainable_variables(self, group: VariableGroup) -> Sequence[Any]:
        """Return the variables of one group that an optimizer may change; none when frozen."""

    @abstractmethod
    def read_variable(self, name: str, ndim: int | None = None) -> Any:
        """Return the value of a variable as a tensor of the framework, in whose graph gradients reach the variable.

        Parameters
        ----------
        name : str
            The variable's name.
        ndim : int, optional
            Number of dimensions of the tensor that it is to be computed with: a variable with a value per channel is
            shaped to broadcast against it. By default the variable's own shape.

        Raises
        ------
        QuantizerStateError
            When there is no such variable.
        """

    @abstractmethod
    def to_numpy(self, variable: Any) -> NDArray[Any]:
        """Return a variable's value as a NumPy array."""

    @abstractmethod
    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Set a variable to a value of its shape, in place."""

    @abstractmethod
    def convert2inferable(self) -> Any:
        """Return the inferable quantizer that gives bit for bit what this one gives in eval mode."""

    # ---- what a method may change -----------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        """Bit widths that the quantizer keeps a grid for."""
        return (self.quantization_config.n_bits,)

    @property
    def selected_width(self) -> int:
        """Bit width that is deployed."""
        return self.widths[0]

    def select_width(self, width: int) -> None:
        """Change the quantizer's variables so that `width` is deployed; loading a finalized model asks for it.

        A method with several widths writes it together with `selected_width`.

        Raises
        ------
        QuantizerStateError
            When another width is selected and the method has no way to change that.
        """
        if width != self.selected_width:
            raise QuantizerStateError(
                self.subject,
                f"it can't deploy {width} bits; {type(self).__name__} selects {self.selected_width}",
                "a method with several widths overrides `select_width`.",
            )

    @property
    def chooses_width(self) -> bool:
        """Whether the method chooses the width by itself, among `widths`: a config's ``n_bits`` doesn't say it."""
        return len(self.widths) > 1 or self.quantization_config.candidates is not None

    @property
    def levels(self) -> tuple[int, ...]:
        """The table of a look-up-table grid, whole numbers from -128 to 127; empty on every other grid."""
        return ()

    def levels_as_variables(self, levels: tuple[int, ...]) -> list[tuple[Any, NDArray[Any]]]:
        """Return the variables that decide the table, each with the value that makes it these levels.

        Raises
        ------
        InvalidArgumentError
            When the quantizer can't have these levels.
        """
        if levels != self.levels:
            problem = f"{LUT_VALUES!r} is {list(levels)}, and its levels are {list(self.levels)}"
            raise InvalidArgumentError(self.subject, problem)
        return []

    def add_variables(self) -> None:
        """Add variables beyond the grid's own; called once, from `initialize_quantization`."""

    def get_arguments(self) -> dict[str, Any]:
        """Return the constructor's further arguments, JSON-clean; a method with such arguments overrides it."""
        return {}

    def regularization(self) -> Any:
        """Return a scalar term for the loss, or None when the method has none."""
        return None

    def regularization_of(self, x: Any) -> Any:
        """Return a scalar term for the loss that depends on the tensor too, or None; by default the modifiers'.

        Parameters
        ----------
        x : tensor, float32
            The float tensor.
        """
        if not self.modifiers:
            return None
        x = self.laid_out(x)
        terms = [term for modifier in self.modifiers if (term := modifier.term(self, x)) is not None]
        return sum(terms[1:], start=terms[0]) if terms else None

    def encode_grid(self, numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:  # noqa: ARG002 - a subclass's
        """Return the values of `grid_parameters` that stand for a threshold or a range, in NumPy.

        Parameters
        ----------
        numbers : dict of str to float64 array
            ``threshold``, or ``range_min`` and ``range_max``, all of the shape of the variables; thresholds are
            positive, and ``range_min < range_max``.

        Returns
        -------
        dict of str to array
            A value of the same shape for each of `grid_parameters`. Each element follows from the same element of the
            numbers, and back.
        """
        raise self._no_parameters("encode_grid")

    def decode_grid(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - a subclass's
        """Return the threshold or the range that the values of `grid_parameters` stand for, as tensors.

        Parameters
        ----------
        variables : dict of str to tensor
            The values of `grid_parameters`; gradients given to the result reach the variables through it.

        Returns
        -------
        dict of str to tensor
            ``threshold``, or ``range_min`` and ``range_max``. They need no bounds: those of the grid are applied to
            them, and a gradient that is not finite counts as zero.
        """
        raise self._no_parameters("decode_grid")

    def _no_parameters(self, method: str) -> Exception:
        declared = ", ".join(self.grid_parameters) or "nothing"
        return NotImplementedError(
            f"{type(self).__name__} declares {declared} as grid_parameters and has no `{method}`"
        )

    # ---- modifiers --------------------------------------------------------------------------------------------------

    def modify(self, modifiers: Sequence[Modifier]) -> None:
        """Put modifiers on top of the method; called once, before `initialize_quantization`.

        Raises
        ------
        UnsupportedConfigError
            When one of them can't stand on this quantizer.
        QuantizerStateError
            When it is initialized already.
        """
        if not modifiers:
            return
        if self.structure.widths:
            raise QuantizerStateError(self.subject, "it is initialized; modifiers come before")
        for modifier in modifiers:
            modifier.check(self)
        own: dict[str, Any] = vars(self)  # Keras would track the tuple
        own["modifiers"] = tuple(modifiers)
        own["modified"] = any(modifier.changes_values for modifier in modifiers)
        own["counts_steps"] = self.counts_steps or any(modifier.counts_steps for modifier in modifiers)
        own["deploys_values"] = self.deploys_values or any(modifier.deploys_values for modifier in modifiers)

    def add_state(self, name: str, value: NDArray[Any]) -> None:
        """Keep a float32 tensor that does not learn, found again as the attribute `name`; a backend writes it.

        It is saved, loaded and copied with the variables, but is none of them.
        """
        raise NotImplementedError

    def observe(self, x: Any) -> None:
        """Let the modifiers look at a weight, at the beginning of a training step."""
        x = self.laid_out(x)
        for modifier in self.modifiers:
            modifier.observe(self, x)

    def laid_out(self, x: Any) -> Any:
        """Return a tensor as modifiers see it: with a row for each block that has a scale of its own, if some have."""
        return x

    @property
    def fits_one_shape(self) -> bool:
        """Whether variables or state have a value for each element, so that a tensor of another shape does not fit."""
        return bool(self.modifiers) or any(own_variable(each).per_element for each in self.own_variables)

    @property
    def values_shape(self) -> tuple[int, ...] | None:
        """Shape of a tensor as modifiers see it; see `laid_out`."""
        blocks = self.quantization_config.blocks
        if blocks is None or self.tensor_shape is None:
            return self.tensor_shape
        return blocks.layout(self.tensor_shape).rows

    def report(self) -> dict[str, dict[str, float]]:
        """Return what `describe` tells of the modifiers: numbers, by the name of the modifier."""
        return {modifier.name: modifier.report(self) for modifier in self.modifiers}

    # ---- a schedule's step ------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Count one training step, before its values are computed; a schedule that counts otherwise overrides it."""
        if self.counts_steps:
            self.count_step()

    def count_step(self) -> None:
        """Add one to the state variable ``step``; a backend writes it."""
        raise NotImplementedError

    def add_step(self) -> None:
        """Create the state variable ``step``; a backend writes it."""
        raise NotImplementedError

    @property
    def counted_steps(self) -> int:
        """Number of training steps counted so far; setting it continues the schedule from there."""
        return 0

    @counted_steps.setter
    def counted_steps(self, count: int) -> None:
        raise NotImplementedError

    @property
    def has_schedule(self) -> bool:
        """Whether training steps have to be counted by `advance`."""
        return self.counts_steps or type(self).advance is not BaseTrainableQuantizer.advance

    # ---- the seed's interface ---------------------------------------------------------------------------------------

    @property
    def training_method(self) -> str:
        """Name of the training method the class is registered under; the class's own where its mark has none."""
        return type(self).__name__ if self.identifier is None else identifier_text(self.identifier)

    def activation_quantization(self) -> bool:
        """Return whether this quantizer is for activations."""
        return self.quantization_config.target is QuantizationTarget.Activation

    def weights_quantization(self) -> bool:
        """Return whether this quantizer is for weights."""
        return self.quantization_config.target is QuantizationTarget.Weights

    @property
    def variable_names(self) -> tuple[str, ...]:
        """Names of the quantizer's variables, in the order they were added."""
        return tuple(self._variable_groups)

    @property
    def quantizer_parameters(self) -> Mapping[str, Mapping[str, Any]]:
        """The variables with their groups, ``{name: {"var": variable, "group": group}}``; to be read, not written."""
        told = {
            name: MappingProxyType({"var": self.get_quantizer_variable(name), "group": group})
            for name, group in self._variable_groups.items()
        }
        return MappingProxyType(told)

    def get_quantizer_variable(self, name: str) -> Any:
        """Return the variable added under `name`.

        Raises
        ------
        QuantizerStateError
            When there is none.
        """
        if name not in self.variable_names:
            known = ", ".join(self._variable_groups) or "none; initialize_quantization was not called"
            raise QuantizerStateError(
                self.subject, f"no variable {name!r}; variables: {known}" + nearest(name, self._variable_groups)
            )
        return getattr(self, name)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:  # noqa: ARG002 - the seed's signature
        """Create the variables for a tensor.

        Parameters
        ----------
        tensor_shape : sequence of int or None
            Shape of the weights; activations may pass None.
        name : str
            What the tensor is called in errors.
        layer : object
            The wrapper or holder; not used, the quantizer owns its variables.

        Returns
        -------
        dict of str to variable
            The variables by name.

        Raises
        ------
        ShapeMismatchError
            When axis or number of channels don't fit the tensor. Nothing is created then.
        QuantizerStateError
            When called again for another shape.
        """
        config = self.quantization_config
        try:
            shape = None if tensor_shape is None else tuple(operator.index(size) for size in tensor_shape)
        except TypeError as error:
            raise ShapeMismatchError(f"{self.subject} {name!r}: tensor_shape", "integers", tensor_shape) from error
        variable_shape = qparams.variable_shape(config, shape, f"{self.subject} {name!r}")
        if self.structure.widths:
            if self.structure.shape != variable_shape:
                raise QuantizerStateError(f"{self.subject} {name!r}", "already initialized for another shape")
        else:
            self.tensor_ndim = 0 if shape is None else len(shape)
            vars(self)["tensor_shape"] = shape  # Keras would track it
            self.structure = structure = self._structure(variable_shape)
            for names in structure.names.values():
                for variable_name in names:
                    self.add_quantizer_variable(variable_name, np.full(variable_shape, np.nan, np.float32))
            for own in map(own_variable, self.own_variables):
                if own.initial is not None:
                    value = np.full(own.shape(variable_shape, self.values_shape or ()), own.initial, np.float32)
                    self.add_quantizer_variable(own.name, value, own.group, trained=True)
            if self.counts_steps:
                self.add_step()
            self.add_variables()
            for modifier in self.modifiers:
                modifier.add_state(self)
            params = {width: self._config_params(width) for width in structure.widths}
            if not self.computes_grid and all(set(given) - {SIGNED} for given in params.values()):
                self.set_quantization_params(params)
        return {each: self.get_quantizer_variable(each) for each in self.variable_names}

    def _config_params(self, width: int) -> dict[str, Any]:
        for candidate in self.quantization_config.candidates or []:
            if candidate.n_bits == width and candidate.quantization_params:
                return candidate.quantization_params
        return self.quantization_config.quantization_params

    def _structure(self, shape: tuple[int, ...]) -> Structure:
        widths, keys = self.widths, self._grid_keys
        if len(widths) == 1:
            return Structure(widths, widths[0], shape, {widths[0]: keys})
        return Structure(widths, None, shape, {width: tuple(f"{key}_{width}" for key in keys) for width in widths})

    # ---- numbers ----------------------------------------------------------------------------------------------------

    @property
    def _grid_keys(self) -> tuple[str, ...]:
        if self.computes_grid:
            return ()
        return self.grid_parameters or qparams.variable_names(self.quantization_config.quantization_method)

    def grid_variables(self, width: int) -> dict[str, Any]:
        """Return the variables that one width's grid is made from, by their plain names.

        These are ``threshold``, or ``range_min`` and ``range_max``, or what the class declares as `grid_parameters`.

        Raises
        ------
        QuantizerStateError
            When the quantizer is not initialized, or keeps no grid of that width.
        """
        names = self.structure.names.get(width)
        if names is None:
            known = ", ".join(map(str, self.structure.widths)) or "none; initialize_quantization was not called"
            raise QuantizerStateError(self.subject, f"no grid of {width} bits; widths: {known}")
        return {key: getattr(self, name) for key, name in zip(self._grid_keys, names, strict=True)}

    def grid_tensors(self, width: int) -> dict[str, Any]:
        """Return threshold or range ends of one width as tensors, as far as the variables say them: not bounded yet."""
        return self.decode_grid(self.grid_variables(width)) if self.grid_parameters else self.grid_variables(width)

    def grid_numbers(self, width: int) -> dict[str, NDArray[Any]]:
        """Return threshold or range ends of one width in NumPy, float32; what `decode_grid` makes of the variables.

        Raises
        ------
        QuantizerStateError
            When there is no grid of that width.
        """
        variables = self.grid_variables(width)
        numbers = self.grid_tensors(width) if self.grid_parameters else variables
        return {key: np.asarray(self.to_numpy(value), np.float32) for key, value in numbers.items()}

    def encoded(self, numbers: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Return the values of the grid's variables for a threshold or range: the numbers, or what `encode_grid` makes.

        Raises
        ------
        InvalidArgumentError, ShapeMismatchError
            When `encode_grid` returns other names, other shapes, or what is not finite.
        """
        if not self.grid_parameters:
            return {key: np.asarray(value, np.float32) for key, value in numbers.items()}
        subject = f"{self.subject}: encode_grid"
        made = self.encode_grid({key: np.asarray(value, np.float64) for key, value in numbers.items()})
        if set(made) != set(self.grid_parameters):
            raise InvalidArgumentError(subject, f"it returned {sorted(made)}, needed {sorted(self.grid_parameters)}")
        shape = np.shape(next(iter(numbers.values())))
        values = {key: np.asarray(made[key], np.float32) for key in self.grid_parameters}
        for key, value in values.items():
            if value.shape != shape:
                raise ShapeMismatchError(f"{subject}: {key}", f"shape {shape}", f"shape {value.shape}")
            if not np.isfinite(value).all():
                given = {name: np.asarray(number).tolist() for name, number in numbers.items()}
                raise InvalidArgumentError(f"{subject}: {key}", f"{value.tolist()} for {given} is not finite")
        return values

    def set_quantization_params(self, params: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over calibrated numbers.

        Parameters
        ----------
        params : mapping of int to mapping
            Quantization params, as in the configs, for each of `widths`.

        Raises
        ------
        InvalidArgumentError, ShapeMismatchError
            When they are wrong or don't fit; nothing is changed then.
        QuantizerStateError
            Before `initialize_quantization`.
        """
        config = self.quantization_config
        if not self.variable_names:
            raise QuantizerStateError(self.subject, "initialize_quantization has not been called")
        widths = self.structure.widths
        if not isinstance(params, Mapping) or set(params) != set(widths):
            given = f"widths {list(params)}" if isinstance(params, Mapping) else repr(params)
            raise InvalidArgumentError(self.subject, f"params for {given}, needed for widths {list(widths)}")
        new: list[tuple[Any, NDArray[Any]]] = []
        signs = set()
        for width in widths:
            given = plain(params[width])
            try:
                check_params(given, config.quantization_method, width, config.target)
            except ValueError as error:
                raise InvalidArgumentError(self.subject, str(error)) from None
            values = qparams.variables_from_params(given, config.quantization_method)
            new += self.levels_as_variables(tuple(sorted(given.get(LUT_VALUES, self.levels))))
            if not values:
                raise InvalidArgumentError(self.subject, f"no numbers for width {width}: {dict(given)}")
            signs.add(self.signed if RANGE_MIN in given else bool(given.get(SIGNED, self.signed)))
            variables, shape = self.grid_variables(width), self.structure.shape
            for key, value in values.items():
                if value.size != 1 and value.shape != shape:
                    raise ShapeMismatchError(f"{self.subject}: {key}", f"shape {shape}", f"shape {value.shape}")
                values[key] = np.broadcast_to(value.reshape(-1) if shape else value.reshape(()), shape)
            new += [(variables[key], value.copy()) for key, value in self.encoded(values).items()]
        if len(signs) != 1:
            raise InvalidArgumentError(self.subject, f"{SIGNED!r} differs between widths")
        for variable, value in new:
            self.assign(variable, value)
        self.note_numbers()
        (self.signed,) = signs
        self.calibrated = True
        for modifier in self.modifiers:
            modifier.start_anew(self)

    def note_numbers(self) -> None:
        """Note in `numbers_set` what the variables of the grids are now."""
        names = [name for width in self.structure.widths for name in self.structure.names[width]]
        own: dict[str, Any] = vars(self)  # Keras would track it
        own["numbers_set"] = {name: np.array(self.to_numpy(getattr(self, name)), np.float32) for name in names}

    def switch_off(self) -> None:
        """Pass tensors on as they are from here on, and deploy nothing, as if the config had said so."""
        name = f"enable_{self.quantization_config.prefix}_quantization"
        self.quantization_config = self.quantization_config.model_copy(update={name: False})

    @property
    def calibrated(self) -> bool:
        """Whether the quantizer has its numbers; one that needs none, or makes them by itself, always has."""
        return self._calibrated or self.needs_no_numbers

    @calibrated.setter
    def calibrated(self, value: bool) -> None:
        self._calibrated = value

    @property
    def needs_no_numbers(self) -> bool:
        """Whether there is nothing to calibrate: the grid is computed from the tensor, or the class does it all."""
        return (self.computes_grid and bool(self.structure.widths)) or self.deploys_itself

    @property
    def deploys_itself(self) -> bool:
        """Whether the class's own methods initialize and convert it, without the base class's variables."""
        made = {name: getattr(type(self), name).__module__ for name in ("initialize_quantization", "convert2inferable")}
        foreign = all(module.partition(".")[0] not in _PACKAGES for module in made.values())
        return foreign and not self.structure.widths

    def require_calibrated(self) -> None:
        """Raise QuantizerStateError unless the quantizer has its numbers."""
        if not self.calibrated:
            what = "has no quantization params yet" if self.variable_names else "is not initialized"
            raise QuantizerStateError(self.subject, what, "calibrate the model, or give the params in the config.")

    def require_deployable(self) -> None:
        """Raise QuantizerStateError unless the quantizer has its numbers and is switched on."""
        if not self.quantization_config.enabled:
            raise QuantizerStateError(self.subject, "its config switches quantization off; there is nothing to deploy")
        self.require_calibrated()

    def current_qparams(self, width: int | None = None) -> qparams.QParams:
        """Return the numbers of one width's grid (default: the selected one) as they stand.

        Raises
        ------
        QuantizerStateError
            Before calibration, or when the grid is computed from the tensor itself.
        """
        self.require_calibrated()
        if self.computes_grid:
            raise QuantizerStateError(self.subject, "it computes its grid from each tensor, and has none without one")
        config = self.quantization_config
        width = self.selected_width if width is None else width
        return qparams.from_variables(
            self.grid_numbers(width),
            config.quantization_method,
            width,
            signed=self.signed,
            min_threshold=config.min_threshold,
            channels_axis=config.channels_axis,
            levels=self.levels,
        )

    def deployed_qparams(self) -> qparams.QParams:
        """Return the grid that is deployed: that of the variables, or of a batch norm folded into the weights."""
        return self.current_qparams() if self.folded_grid is None else self.folded_grid

    def current_config(self) -> TrainableQuantizerConfig:
        """Return the config with the trained numbers and the selected width in it: the quantizer as it stands."""
        self.require_calibrated()
        if self.computes_grid:
            return self.quantization_config
        width, config = self.selected_width, self.quantization_config
        params = qparams.inferable_params(self.current_qparams(width), config.quantization_method)
        if config.target is QuantizationTarget.Weights:
            params.pop(SIGNED, None)
        fields = {name: getattr(config, name) for name in type(config).model_fields}
        changed = {"n_bits": width, "quantization_params": params, "quantization_candidates": None}
        return type(config)(**{**fields, **{f"{config.prefix}_{name}": value for name, value in changed.items()}})

    @property
    def stores_sign(self) -> bool:
        """Whether calibration decides the sign, so that a saved state must have it."""
        uniform = self.quantization_config.quantization_method is QuantizationMethod.UNIFORM
        return self.activation_quantization() and not uniform and not self.computes_grid

    # ---- documents --------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` rebuilds the quantizer from: JSON-clean, candidates and trained values included."""
        config = self.quantization_config
        state = {name: self.to_numpy(self.get_quantizer_variable(name)).tolist() for name in self.variable_names}
        document = {
            "quantization_config": config_document(config),
            "freeze_quant_params": self.freeze_quant_params,
            "arguments": self.get_arguments(),
            "tensor_ndim": self.tensor_ndim,
            "signed": self.signed,
            "variables": state if self.calibrated else {},
        }
        if self.modifiers:
            document["modifiers"] = {each.name: each.model_dump(mode="json") for each in self.modifiers}
        if self.tensor_shape and self.fits_one_shape:
            document["tensor_shape"] = list(self.tensor_shape)
        return {**document, "step": self.counted_steps} if self.counts_steps else document

    @classmethod
    def from_config(cls: type[Q], config: Mapping[str, Any]) -> Q:  # noqa: PYI019 - Self is not in Python 3.10
        """Return a quantizer equal to the one that `get_config` was called on.

        Raises
        ------
        InvalidArgumentError
            When the document lacks a part, or a part is not what the quantizer has.
        pydantic.ValidationError
            When its quantization config is wrong; names the field.
        """
        subject = f"{cls.__name__}.from_config"
        document = read_document(config, subject)
        try:
            quantizer = cls(
                document.quantization_config, freeze_quant_params=document.freeze_quant_params, **document.arguments
            )
        except TypeError as error:  # an argument that the class doesn't take
            raise InvalidArgumentError(subject, f"arguments: {error}") from error
        quantizer.modify(modifiers_of(document.modifiers, cls.backend, subject))
        step = config.get("step")
        if quantizer.counts_steps and (not isinstance(step, int) or isinstance(step, bool)):
            raise InvalidArgumentError(subject, f"not a quantizer's config: 'step' is {step!r}")
        if document.variables:
            quantizer._restore(document.variables, document.tensor_ndim, document.tensor_shape)
            quantizer.signed, quantizer.calibrated = document.signed, True
        elif cls.computes_grid:
            shape = (1,) * document.tensor_ndim
            quantizer.initialize_quantization(shape or None, "restored", None)
        if isinstance(step, int) and quantizer.counts_steps and quantizer.variable_names:
            quantizer.counted_steps = step
        return quantizer

    def _restore(
        self, variables: Mapping[str, NDArray[Any]], tensor_ndim: int, tensor_shape: tuple[int, ...] | None = None
    ) -> None:
        """Initialize and take over variables as `get_config` wrote them."""
        first = next(iter(self._structure(()).names.values()))[0]
        if first not in variables:
            raise InvalidArgumentError(f"{self.subject}: variables", f"needed {first!r}, got {list(variables)}")
        shape = qparams.shape_with(self.quantization_config, tensor_ndim, (variables[first].size,))
        given = shape if tensor_shape is None else tensor_shape
        own = self.initialize_quantization(given if tensor_ndim else None, "restored", None)
        if set(own) != set(variables):
            raise InvalidArgumentError(f"{self.subject}: variables", f"needed {list(own)}, got {list(variables)}")
        for name, given_value in variables.items():
            shape_of_own = tuple(own[name].shape)
            # the lists of a document don't tell the dimensions behind one that is empty
            value = given_value if given_value.size else given_value.reshape(shape_of_own)
            if shape_of_own != value.shape:
                raise ShapeMismatchError(f"{self.subject}: {name}", f"shape {tuple(own[name].shape)}", value.shape)
            self.assign(own[name], value)


# ---- reading what `get_config` wrote ---------------------------------------------------------------------------------

MAX_NDIM = 64  # NumPy's limit


@dataclass(frozen=True)
class QuantizerDocument:
    """The parts of a quantizer's document, checked."""

    quantization_config: TrainableQuantizerConfig
    freeze_quant_params: bool
    arguments: dict[str, Any]
    tensor_ndim: int
    signed: bool
    variables: dict[str, NDArray[Any]]
    modifiers: dict[str, dict[str, Any]]
    tensor_shape: tuple[int, ...] | None


def read_document(config: object, subject: str) -> QuantizerDocument:
    """Return the parts of a quantizer's document.

    Raises
    ------
    UnsupportedConfigError
        When a part is missing or of the wrong kind; names it.
    pydantic.ValidationError
        When its quantization config is wrong; names the field.
    """
    try:
        plain(config)
    except ValueError as error:
        raise InvalidArgumentError(subject, str(error)) from None
    if not isinstance(config, Mapping):
        raise InvalidArgumentError(subject, f"a quantizer's config is a mapping, got {type(config).__name__}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "quantization_config": Mapping,
        "freeze_quant_params": bool,
        "arguments": Mapping,
        "tensor_ndim": int,
        "signed": bool,
        "variables": Mapping,
    }
    for key, kind in kinds.items():
        value = config.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidArgumentError(subject, f"not a quantizer's config: {key!r} is {value!r}")
    if not 0 <= config["tensor_ndim"] <= MAX_NDIM:
        raise InvalidArgumentError(subject, f"tensor_ndim can't be {config['tensor_ndim']!r}")
    quantization_config = config_from_document(config["quantization_config"], f"{subject}: quantization_config")
    variables = {}
    for name, value in config["variables"].items():
        try:
            with np.errstate(over="raise"):  # a variable cannot hold a number beyond float32
                variables[str(name)] = np.asarray(value, np.float32)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidArgumentError(subject, f"variables.{name}: {error}") from error
    return QuantizerDocument(
        quantization_config,
        config["freeze_quant_params"],
        dict(config["arguments"]),
        config["tensor_ndim"],
        config["signed"],
        variables,
        _modifiers_part(config.get("modifiers", {}), subject),
        _shape_part(config.get("tensor_shape"), subject),
    )


def _modifiers_part(modifiers: Any, subject: str) -> dict[str, dict[str, Any]]:
    if not isinstance(modifiers, Mapping) or not all(isinstance(each, Mapping) for each in modifiers.values()):
        raise InvalidArgumentError(subject, f"not a quantizer's config: 'modifiers' is {modifiers!r}")
    return {str(name): dict(arguments) for name, arguments in modifiers.items()}


def _shape_part(shape: Any, subject: str) -> tuple[int, ...] | None:
    if shape is None:
        return None
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise InvalidArgumentError(subject, f"not a quantizer's config: 'tensor_shape' is {shape!r}")
    return tuple(shape)


def modifiers_of(arguments: Mapping[str, Mapping[str, Any]], backend: str, subject: str) -> list[Modifier]:
    """Return a backend's modifiers by what a plan or a document says of them.

    Parameters
    ----------
    arguments : mapping of str to mapping
        Arguments by the name of the modifier.
    backend : str
        Whose classes.
    subject : str
        What has the modifiers, for errors.

    Raises
    ------
    UnsupportedConfigError
        When there is no modifier of a name.
    pydantic.ValidationError
        When an argument is wrong; names it.
    """
    return [get_modifier_class(name, backend, subject).model_validate(given) for name, given in arguments.items()]
