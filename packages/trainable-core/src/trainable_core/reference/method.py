"""What a training method declares of itself, once for every framework.

Each module of this package that defines a method ends with its declaration, ``METHOD``, and
`trainable_core.registry.methods` collects them. The registry, the conformance kit, ``trainable matrix``,
``trainable methods`` and the documentation read them, so a new method is listed nowhere else. A class from a plugin
says the same by class attributes of the same names, or with a `Method` of its own as ``declaration``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trainable_core.enums import WEIGHTS_ONLY, QuantizationMethod, QuantizationTarget, VariableGroup
from trainable_core.errors import InvalidArgumentError, nearest
from trainable_core.reference.oracle import Oracle

TrainingForward = Literal["deployed", "soft", "random"]
Dependence = Literal["element", "channel", "tensor"]

DECLARED = (
    "learns_grid",
    "grid_parameters",
    "own_variables",
    "training_forward",
    "counts_steps",
    "depends_on",
    "deploys_values",
    "computes_grid",
    "conformance_arguments",
)
"""Fields of `Method` that a quantizer class may declare by class attributes of the same names."""


@dataclass(frozen=True)
class OwnVariable:
    """A variable that a method trains beside thresholds and ranges.

    Parameters
    ----------
    name : str
        Name of the attribute, and of the variable in a saved state.
    per_channel : bool
        Whether there is one value for each threshold: the shape is that of the threshold. Otherwise there is one value
        for the tensor, or whatever `add_variables` makes.
    initial : float, optional
        Value that the base class creates it with; None: the method's `add_variables` creates it.
    group : VariableGroup
        The optimizer group that it belongs to.
    per_element : bool
        Whether there is one value for each element of the tensor.

    Examples
    --------
    >>> OwnVariable("alpha", per_channel=True, initial=0.3).shape((64,))
    (64,)
    """

    name: str
    per_channel: bool = False
    initial: float | None = None
    group: VariableGroup = VariableGroup.QPARAMS
    per_element: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise InvalidArgumentError("OwnVariable", f"name must be an identifier, got {self.name!r}")

    def shape(self, threshold: tuple[int, ...], tensor: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the shape of a variable that the base class creates, from those of the threshold and the tensor."""
        return tensor if self.per_element else threshold if self.per_channel else ()


@dataclass(frozen=True)
class Option:
    """An argument that a method's constructor takes beyond those of every quantizer; a recipe gives it in `arguments`.

    Parameters
    ----------
    name : str
        The argument's name.
    default : object
        Its default.
    summary : str
        What it does, in a few words.
    """

    name: str
    default: Any
    summary: str = ""


@dataclass(frozen=True)
class Method:
    """The declaration of a training method.

    Parameters
    ----------
    name : str
        What recipes and the registry call it.
    title : str
        Its full name.
    reference : str
        Where it was published.
    module : str
        The module that defines it; a built-in's quantizers are in modules of the same name in every backend.
    learns_grid : bool
        Whether thresholds and ranges are learned.
    own_variables : tuple of str or OwnVariable
        Further variables that are learned; a name alone says nothing of the variable's shape.
    grid_parameters : tuple of str
        Names of the variables that stand for the threshold, or for the ends of the range, where these are not learned
        themselves; the class converts them by `encode_grid` and `decode_grid`.
    options : tuple of Option
        Further arguments of the constructor.
    targets : tuple of QuantizationTarget
        What it can quantize.
    grids : tuple of QuantizationMethod
        The grids it can train; see `grids_of`.
    training_forward : {"deployed", "soft", "random"}
        What its values are in training mode: those that are deployed, others that follow from the input and the state,
        or random ones.
    schedule_end : callable, optional
        From the constructor's further arguments to the number of counted training steps from which on the values of a
        soft or random forward are the deployed ones. Without it they never are.
    counts_steps : bool
        Whether the base class counts training steps for a schedule, in the state variable ``step``.
    depends_on : {"element", "channel", "tensor"}
        What the value of an element depends on besides the variables: on the element alone, on all elements that share
        its threshold, or on the whole tensor.
    deploys_values : bool
        Whether the quantized values are stored in the place of the float weights when a model is finalized. It is for
        methods whose values are not those of the deployed grid on the float weights, such as DoReFa; for weights only.
    computes_grid : bool
        Whether the grid is computed from the tensor itself at every call: there are no thresholds, and nothing is
        calibrated.
    conformance_arguments : tuple of dict
        Further arguments that the conformance kit tries besides the defaults.
    oracle : Oracle, optional
        What the conformance kit expects. Without one, gradients are compared with a declared `surrogate`, or only have
        to be finite.
    """

    name: str
    title: str = ""
    reference: str = ""
    module: str = ""
    learns_grid: bool = False
    own_variables: tuple[str | OwnVariable, ...] = ()
    grid_parameters: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    targets: tuple[QuantizationTarget, ...] = (QuantizationTarget.Weights, QuantizationTarget.Activation)
    grids: tuple[QuantizationMethod, ...] = (
        QuantizationMethod.POWER_OF_TWO,
        QuantizationMethod.SYMMETRIC,
        QuantizationMethod.UNIFORM,
    )
    training_forward: TrainingForward = "deployed"
    schedule_end: Callable[[Mapping[str, Any]], int] | None = None
    counts_steps: bool = False
    depends_on: Dependence = "element"
    deploys_values: bool = False
    computes_grid: bool = False
    conformance_arguments: tuple[dict[str, Any], ...] = ()
    oracle: Oracle | None = None

    def __post_init__(self) -> None:
        for field, kinds in (("training_forward", TrainingForward), ("depends_on", Dependence)):
            value, known = getattr(self, field), get_args(kinds)
            if value not in known:
                problem = f"{field} is {value!r}, not one of {', '.join(known)}"
                raise InvalidArgumentError(self.name, problem, nearest(value, known).strip().removeprefix("Hint: "))
        for field in ("own_variables", "grid_parameters", "conformance_arguments"):
            if not isinstance(getattr(self, field), tuple):
                problem = f"{field} is {getattr(self, field)!r}, which is not a tuple"
                raise InvalidArgumentError(self.name, problem, "a tuple of one element ends with a comma.")
        names = [*self.grid_parameters, *self.own_names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InvalidArgumentError(self.name, f"a variable is declared twice: {', '.join(twice)}")

    def grids_of(self, target: QuantizationTarget) -> tuple[QuantizationMethod, ...]:
        """Return the grids that it can train for a target: `grids`, of activations without those of weights alone."""
        is_weight = target is QuantizationTarget.Weights
        return tuple(grid for grid in self.grids if is_weight or grid not in WEIGHTS_ONLY)

    @property
    def own(self) -> tuple[OwnVariable, ...]:
        """Its own variables, each as a record."""
        return tuple(own_variable(each) for each in self.own_variables)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of its own variables."""
        return tuple(each.name for each in self.own)

    @property
    def learns(self) -> tuple[str, ...]:
        """What its quantizers learn, in words."""
        grid = ("thresholds", "ranges") if self.learns_grid else ()
        return (*grid, *self.own_names)


def own_variable(declared: str | OwnVariable) -> OwnVariable:
    """Return the record of a variable that may be declared by its name alone."""
    return declared if isinstance(declared, OwnVariable) else OwnVariable(declared)
