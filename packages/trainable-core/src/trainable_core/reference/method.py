"""What a training method declares of itself, once for every framework.

Each module of this package that defines a method ends with its declaration, ``METHOD``, and
`trainable_core.registry.methods` collects them. The registry, the conformance kit, ``trainable matrix``,
``trainable methods`` and the documentation read them, so a new method is listed nowhere else. A class from a plugin
says the same by class attributes of the same names, or with a `Method` of its own as ``declaration``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.reference.oracle import Oracle

TrainingForward = Literal["deployed", "soft", "random"]


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
    own_variables : tuple of str
        Names of further variables that are learned.
    options : tuple of Option
        Further arguments of the constructor.
    targets : tuple of QuantizationTarget
        What it can quantize.
    grids : tuple of QuantizationMethod
        The grids it can train.
    training_forward : {"deployed", "soft", "random"}
        What its values are in training mode: those that are deployed, others that follow from the input and the state,
        or random ones.
    schedule_end : callable, optional
        From the constructor's further arguments to the number of counted training steps from which on the values of a
        soft or random forward are the deployed ones. Without it they never are.
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
    own_variables: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    targets: tuple[QuantizationTarget, ...] = (QuantizationTarget.Weights, QuantizationTarget.Activation)
    grids: tuple[QuantizationMethod, ...] = (
        QuantizationMethod.POWER_OF_TWO,
        QuantizationMethod.SYMMETRIC,
        QuantizationMethod.UNIFORM,
    )
    training_forward: TrainingForward = "deployed"
    schedule_end: Callable[[Mapping[str, Any]], int] | None = None
    conformance_arguments: tuple[dict[str, Any], ...] = ()
    oracle: Oracle | None = None

    @property
    def learns(self) -> tuple[str, ...]:
        """What its quantizers learn, in words."""
        return (*(("thresholds", "ranges") if self.learns_grid else ()), *self.own_variables)
