"""Deployed quantizers: a grid in a layer's variables, told as mctq tells it; each Keras adds the layer.

mctq's own classes call TensorFlow's ``fake_quant`` kernels. Ours are instances of them where TensorFlow runs, and mend
this (the measurements are in ``docs/design/0017-corrected-mctq-keras-classes.md``):

- the forward is `HalfUp.snap`, the formula that trained; the kernels nudge ranges once more in float32 and may give the
  neighbouring code next to a tie;
- 1-bit grids work, and inputs of any floating dtype come back in their own dtype;
- the numbers are variables of a layer: they are saved, and no graph compiler takes them for constants that it
  multiplies into the layers around, which moves ties;
- `get_config` is JSON-clean whatever numbers the quantizer was made from.

`KerasInferableQuantizer.to_mctq` gives mctq's stock quantizer with the same numbers, for tools that look for
TensorFlow's ``FakeQuant`` operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from mct_quantizers import QuantizationMethod as MctqMethod
from mct_quantizers import QuantizationTarget as MctqTarget
from mct_quantizers import mark_quantizer
from mct_quantizers.common.base_inferable_quantizer import BaseInferableQuantizer, QuantizerID
from numpy.typing import NDArray

from trainable_core.backend.inferable import target_and_method
from trainable_core.backend.unlisted import UnlistedSubclass
from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import WEIGHTS_ONLY, QuantizationMethod, QuantizationTarget
from trainable_core.errors import ModelError
from trainable_core.qparams import QParams, from_params, inferable_params
from trainable_keras.functions import Functions, Tensor
from trainable_keras.ops import HalfUp

MCTQ_LEAST_BITS = 2
"""TensorFlow's kernels have no 1-bit grid."""

_NAMES = {THRESHOLD: "threshold", RANGE_MIN: "min_range", RANGE_MAX: "max_range"}


def mctq_arguments(
    qparams: QParams, n_bits: int, ndim: int, target: QuantizationTarget, method: QuantizationMethod
) -> dict[str, Any]:
    """Return the arguments that build mctq's Keras inferable quantizer of a grid, JSON-clean.

    Parameters
    ----------
    qparams : QParams
        The grid's numbers.
    n_bits : int
        Width of the codes.
    ndim : int
        Number of dimensions of the weights tensor; 0 for activations.
    target, method
        Which class.
    """
    params = inferable_params(qparams, method)
    signed = params.pop(SIGNED, None)
    arguments: dict[str, Any] = {"num_bits": n_bits}
    if qparams.levels:  # mctq's eps, a summand of the threshold, moves ties
        arguments |= {"lut_values": [float(level) for level in params.pop(LUT_VALUES)], "eps": 0.0}
    arguments |= {_NAMES[key]: value if isinstance(value, list) else [value] for key, value in params.items()}
    if target is QuantizationTarget.Weights:
        axis = qparams.channels_axis
        per_channel = axis is not None
        return {
            **arguments,
            "per_channel": per_channel,
            "channel_axis": None if axis is None else axis % ndim,
            "input_rank": ndim,
        }
    return arguments if signed is None else {**arguments, "signed": signed}


def grid_of_arguments(config: Mapping[str, Any], method: QuantizationMethod) -> tuple[QParams, int, int]:
    """Return grid, width and number of dimensions that `mctq_arguments` was called with."""
    params = {key: config[name] for key, name in _NAMES.items() if name in config}
    axis = config.get("channel_axis") if config.get("per_channel", False) else None
    if axis is None:
        params = {key: value[0] for key, value in params.items()}
    if "lut_values" in config:
        params[LUT_VALUES] = config["lut_values"]
    n_bits, signed = config["num_bits"], config.get("signed", True)
    qparams = from_params(method, n_bits, signed, params, channels_axis=axis)
    if method is QuantizationMethod.UNIFORM:
        qparams = _exact(params, qparams)
    return qparams, n_bits, config.get("input_rank") or 0


def _exact(params: Mapping[str, Any], derived: QParams) -> QParams:
    """Return the grid whose ends are a range, where there is one; else the derived grid, which bounds ranges."""
    low, high = (np.asarray(params[key], np.float64) for key in (RANGE_MIN, RANGE_MAX))
    scale = (high - low) / derived.quant_max  # exact for a nudged range: code * scale is
    zero_point = np.rint(-low / scale)
    if np.any(scale != scale.astype(np.float32)) or np.any(zero_point * scale != -low):
        return derived
    return replace(derived, scale=scale.astype(np.float32), zero_point=zero_point.astype(np.int32))


Q = TypeVar("Q", bound="KerasInferableQuantizer")


class KerasInferableQuantizer:
    """What a deployed quantizer of either Keras is beside a layer of it.

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

    functions: ClassVar[Functions]
    ops: ClassVar[HalfUp]
    mctq_class: ClassVar[Any] = None
    """mctq's class with the same name, None where its kernels can't run."""

    native: ClassVar[str] = ""
    """Which kind of `trainable_keras.granularity` it is; empty for those that mctq has too."""

    quantization_target: ClassVar[Any]
    quantization_method: ClassVar[Any]

    grid_scale: Any
    grid_zero_point: Any
    channel_axis: int | None
    per_channel: bool
    input_rank: int
    num_bits: int
    quant_min: int
    quant_max: int
    levels: tuple[int, ...]

    def __init__(self, qparams: QParams | None, n_bits: int, ndim: int, name: str | None = None) -> None:
        raise NotImplementedError

    def start(self, qparams: QParams | None, n_bits: int, ndim: int) -> None:
        """Set what is not a variable; called once, by the constructor.

        Parameters
        ----------
        qparams : QParams or None
            The grid's numbers; None where the grid is computed from the tensor itself.
        n_bits : int
            Width of the codes.
        ndim : int
            Number of dimensions of the weights tensor; 0 for activations.
        """
        self.input_rank = ndim
        self.num_bits = n_bits
        self.levels: tuple[int, ...] = ()
        if qparams is not None:
            self.channel_axis = qparams.channels_axis
            self.per_channel = qparams.channels_axis is not None
            self.quant_min, self.quant_max = qparams.quant_min, qparams.quant_max
            self.levels = qparams.levels

    @classmethod
    def method(cls) -> QuantizationMethod:
        """Return the grid's method."""
        return target_and_method(cls)[1]

    def snapped(self, inputs: Tensor) -> Tensor:
        """Return the input snapped to the grid, in the input's dtype.

        The gradient of an activation is that of `trainable_core.reference.ste`; weights are constants.
        """
        f = self.functions
        values = f.cast(inputs, "float32")
        passes = target_and_method(type(self))[0] is QuantizationTarget.Activation
        snap = self.ops.snap_passing if passes else self.ops.snap
        values = values if passes else f.stop_gradient(values)
        if self.levels:
            to_levels: Any = self.ops.snap_to_levels_passing if passes else self.ops.snap_to_levels
            scale = f.hide_shape(f.read(self.grid_scale))
            snapped = to_levels(values, scale, tuple(self.levels), signed=self.quant_min < 0)
            return f.cast(f.show_shape(snapped, values), f.dtype_of(inputs))
        zero_point = f.read(self.grid_zero_point) if self.method() is QuantizationMethod.UNIFORM else None
        # hidden as in training: else Grappler multiplies it into the operations around, in the deployed model alone
        scale = f.hide_shape(f.read(self.grid_scale))
        snapped = f.show_shape(snap(values, scale, zero_point, self.quant_min, self.quant_max), values)
        return f.cast(snapped, f.dtype_of(inputs))

    @property
    def qparams(self) -> QParams:
        """The grid's numbers, from the variables."""
        shape = () if self.channel_axis is None else (-1,)
        scale, zero_point = (
            self.functions.to_numpy(each).reshape(shape) for each in (self.grid_scale, self.grid_zero_point)
        )
        whole = zero_point.astype(np.int32)
        return QParams(scale, whole, self.quant_min, self.quant_max, self.channel_axis, tuple(self.levels))

    @property
    def params(self) -> dict[str, Any]:
        """Threshold or nudged range, as in the configs."""
        return inferable_params(self.qparams, self.method())

    def mctq_arguments(self) -> dict[str, Any]:
        """Return the arguments that build mctq's stock quantizer."""
        target, method = target_and_method(type(self))
        return mctq_arguments(self.qparams, self.num_bits, self.input_rank, target, method)

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:  # noqa: ARG002 - mctq's signature
        """Do nothing: the numbers are there from the start."""
        return {}

    def to_mctq(self) -> Any:
        """Return mctq's stock inferable quantizer with the same numbers.

        Raises
        ------
        ModelError
            Where TensorFlow doesn't run, or for 1 bit: mctq's class can't do that.
        """
        if self.mctq_class is None or (self.num_bits < MCTQ_LEAST_BITS and not self.levels):
            engine = "another engine" if self.mctq_class is None else "TensorFlow"
            raise ModelError(
                f"mctq's Keras quantizers need TensorFlow and 2 to 16 bits; this is {engine} with {self.num_bits} bits"
            )
        return self.mctq_class(**self.mctq_arguments())

    def get_config(self) -> dict[str, Any]:
        """Return mctq's arguments: JSON-clean and lossless."""
        return self.mctq_arguments()

    @classmethod
    def from_config(cls: type[Q], config: Mapping[str, Any]) -> Q:  # noqa: PYI019 - Self is not in Python 3.10
        """Return a quantizer equal to the one that `get_config` was called on."""
        qparams, n_bits, ndim = grid_of_arguments(config, cls.method())
        return cls(qparams, n_bits, ndim, name=config.get("name"))


SHORT = {
    QuantizationMethod.SYMMETRIC: "Symmetric",
    QuantizationMethod.POWER_OF_TWO: "POT",
    QuantizationMethod.UNIFORM: "Uniform",
    QuantizationMethod.LUT_SYM_QUANTIZER: "LUTSymmetric",
    QuantizationMethod.LUT_POT_QUANTIZER: "LUTPOT",
}
"""What mctq's class names call each grid."""


def classes_for(base: type[Q], mctq: Any, register: Callable[[Any], Any]) -> dict[str, type[Q]]:
    """Return the deployed quantizer classes of one Keras by their names, which are mctq's.

    Parameters
    ----------
    base : type
        That Keras's layer.
    mctq : module or None
        mctq's Keras quantizers, whose classes ours then inherit; None where they can't run.
    register : callable
        Decorates a class with the name that Keras saves it under.
    """
    classes: dict[str, type[Q]] = {}
    for target in QuantizationTarget:
        for method, short in SHORT.items():
            if method in WEIGHTS_ONLY and target is QuantizationTarget.Activation:
                continue
            written = short if target is QuantizationTarget.Weights else short.replace("LUT", "Lut")  # as mctq does
            name = f"{target.name}{written}InferableQuantizer"
            text = f"Deployed {method.name} {'weights' if target is QuantizationTarget.Weights else 'activations'}."
            stock = None if mctq is None else getattr(mctq, name)
            members = {"__doc__": text, "__module__": base.__module__, "mctq_class": stock}
            cls: Any = UnlistedSubclass(name, (base,), members, of=stock or BaseInferableQuantizer)
            mark = mark_quantizer(MctqTarget[target.name], [MctqMethod[method.name]], QuantizerID.INFERABLE)
            classes[name] = register(mark(cls))
    return classes


def probe(quantizer: Any) -> NDArray[np.float32]:
    """Return values at and next to every code and every tie of a grid with one scale, and beyond its ends."""
    qparams = quantizer.qparams
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    low, high = qparams.quant_min - zero_point, qparams.quant_max - zero_point
    values = (np.arange(2 * low - 3, 2 * high + 4) / 2 * scale).astype(np.float32)
    up, down = np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))
    return np.concatenate([values, up, down, np.asarray([np.inf, -np.inf, 3e38, -3e38, 0.0], np.float32)])


def difference(quantizer: Any, values: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any]) -> str:
    """Return where mctq's quantizer gives another code than ours, an empty string where it gives the same.

    Parameters
    ----------
    quantizer : KerasInferableQuantizer
        Ours.
    values, ours, theirs : arrays of one shape
        What was quantized, what ours made of it, and what mctq's made of it.

    Notes
    -----
    TensorFlow's kernels compute with a scale that they derive from the range once more, and multiply by its rounded
    inverse: four roundings of a value of up to ``2**n_bits`` steps. Values so near to a tie may get the next code, and
    a code's value may be as much off.
    """
    scale = quantizer.qparams.along(values.ndim).scale.astype(np.float64)
    if quantizer.levels:  # mctq computes with the numbers that it is given
        return _told(values, ours, theirs, ours != theirs)
    rounding = 4 * 2.0**quantizer.num_bits * 2.0**-24
    with np.errstate(invalid="ignore"):
        steps, our_steps, their_steps = (each.astype(np.float64) / scale for each in (values, ours, theirs))
        our_codes, their_codes = np.rint(our_steps), np.rint(their_steps)
        near = np.abs(steps - np.floor(steps) - 0.5) <= rounding
        same = (our_codes == their_codes) | (near & (np.abs(our_codes - their_codes) <= 1))
        same &= np.abs(their_steps - their_codes) <= rounding
    return _told(values, ours, theirs, ~same)


def _told(values: NDArray[Any], ours: NDArray[Any], theirs: NDArray[Any], wrong: NDArray[np.bool_]) -> str:
    wrong = wrong & ~(np.isnan(ours) & np.isnan(theirs))
    if not wrong.any():
        return ""
    place = tuple(np.argwhere(wrong)[0])
    count = int(wrong.sum())
    return f"{count} of {wrong.size} values differ; {values[place]} becomes {theirs[place]}, and {ours[place]} in ours"
