"""A case, which a law is tried on, and the counterexample that it becomes when the law does not hold."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainable_core import qparams
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.conformance.adapter import PLAIN, Adapter, Run, Way
from trainable_core.constants import LUT_VALUES, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, QuantizationTarget
from trainable_core.errors import TrainableError
from trainable_core.key import Key
from trainable_core.qparams import Float32, QParams
from trainable_core.reference import affine
from trainable_core.reference.method import Method
from trainable_core.reference.oracle import State
from trainable_core.registry.methods import declaration_of, options_of

Config = TrainableQuantizerWeightsConfig | TrainableQuantizerActivationConfig
_CONFIGS: dict[str, type[Config]] = {
    config.prefix: config for config in (TrainableQuantizerWeightsConfig, TrainableQuantizerActivationConfig)
}
Document = dict[str, Any]

BESIDE = {SIGNED, LUT_VALUES}
"""Quantization params that are no numbers of a channel."""
TABLE_WIDTHS = range(1, 9)
"""Widths of look-up tables: mctq's hold integers of 8 bits."""

WIDTHS = {1: "1 bit", 4: "2-4 bits", 8: "5-8 bits", 16: "9-16 bits"}
"""Words of a report for widths up to these."""


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of the kit
    """Raised by a law that does not hold: what was expected, and what was found."""

    def __init__(self, what: str, expected: object, got: object) -> None:
        self.what, self.expected, self.got = what, expected, got
        super().__init__(f"{what}: expected {shown(expected)}, got {shown(got)}")


@dataclass(frozen=True)
class Case:
    """What a law is tried on; plain data, so that it can be made smaller and pasted into a test.

    Parameters
    ----------
    config : TrainableQuantizerWeightsConfig or TrainableQuantizerActivationConfig
        A calibrated config.
    x : float32 array, any shape
        The input.
    upstream : float32 array, shape of `x`
        Gradient of the loss with respect to the output; eighths between -4 and 4.
    factors : tuple of float
        How the variables have changed since calibration; see `move`.
    steps : int
        How many training steps the quantizer's schedule has counted.
    arguments : dict
        Further arguments of the quantizer class.
    way : Way
        How the input is given to the quantizer.
    repeats : tuple of int
        An axis, and how often the tensor repeats a smaller one along it: so a large tensor is still plain data.
    """

    config: Config
    x: Float32
    upstream: Float32
    factors: tuple[float, ...] = (1.0,)
    steps: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    way: Way = PLAIN
    repeats: tuple[int, int] = (0, 1)

    @property
    def part(self) -> tuple[Float32, Float32]:
        """Input and upstream gradient without the repetitions."""
        axis, times = self.repeats
        if times == 1:
            return self.x, self.upstream
        size = self.x.shape[axis] // times
        return self.x.take(range(size), axis), self.upstream.take(range(size), axis)

    def repeated(self, axis: int, times: int) -> Case:
        """Return the case with a tensor that repeats its own along an axis."""
        x, upstream = (np.concatenate([each] * times, axis) for each in self.part)
        return replace(self, x=x, upstream=upstream, repeats=(axis, times))

    def labels(self) -> frozenset[str]:
        """Return what is special about the case, in the words of a report."""
        size = self.x.size
        said = {f"{self.x.ndim}-D", next(words for bits, words in WIDTHS.items() if self.config.n_bits <= bits)}
        said |= granularity(self.config)
        if self.config.channels_axis is not None and self.config.channels_axis < 0:
            said.add("axis from the end")
        if not size:
            said.add("empty")
        if size >= 2**16:
            said.add(f">= 2**{size.bit_length() - 1} elements")
        if self.way.layout != "contiguous":
            said.add(f"{self.way.layout} input")
        if self.way.upstream != "contiguous":
            said.add(f"{self.way.upstream} upstream")
        if not self.way.input_gradient:
            said.add("input without gradient")
        if not np.isfinite(self.x).all():
            said.add("infinities")
        if self.steps:
            said.add("counted steps")
        if set(self.factors) != {1.0}:
            said.add("moved variables")
        if self.config.candidates:
            said.add("candidates")
        if self.at_bound():
            said.add("at a bound")
        return frozenset(said)

    def at_bound(self) -> bool:
        """Return whether a threshold, or a range's width, is at its lower bound or below it."""
        params, bound = self.config.quantization_params, self.config.min_threshold
        numbers = [np.atleast_1d(np.asarray(value, np.float64)) for key, value in params.items() if key not in BESIDE]
        if not numbers:
            return False
        least = min(self.factors)
        width = numbers[0] if len(numbers) == 1 else abs(numbers[0]) + abs(numbers[-1])
        return bool((width * least <= bound).any())

    def document(self) -> Document:
        """Return the case as a JSON document."""
        x, upstream = self.part
        return {
            "config": {"target": self.config.prefix, **self.config.model_dump(mode="json")},
            "arguments": self.arguments,
            "factors": list(self.factors),
            "steps": self.steps,
            "way": asdict(self.way),
            "repeats": list(self.repeats),
            "shape": list(x.shape),
            "x": x.reshape(-1).astype(float).tolist(),
            "upstream": upstream.reshape(-1).astype(float).tolist(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Case:
        """Return the case that `document` was written from."""
        fields = dict(document["config"])
        config = _CONFIGS[fields.pop("target")].model_validate(fields)
        x, upstream = (np.array(document[key], np.float32).reshape(document["shape"]) for key in ("x", "upstream"))
        case = cls(config, x, upstream, tuple(document["factors"]), int(document["steps"]), dict(document["arguments"]))
        axis, times = document.get("repeats", (0, 1))
        return replace(case.repeated(axis, times) if times > 1 else case, way=Way(**document.get("way", {})))


class Table(NamedTuple):
    """A look-up table that a class makes."""

    width: int
    arguments: dict[str, Any]
    levels: tuple[int, ...]
    signed: bool = True


def _argument_sets(cls: type[Any], method: Method) -> list[dict[str, Any]]:
    taken = {option.name for option in options_of(cls)}
    return [*(given for given in method.conformance_arguments if given.keys() <= taken), {}]


@functools.lru_cache
def tables_of(adapter: Adapter, cls: type[Any], key: Key) -> tuple[Table, ...]:
    """Return the tables of a class, of each width, sign and set of arguments that it takes."""
    made = []
    prefix = "weights" if key.target is QuantizationTarget.Weights else "activation"
    argument_sets = _argument_sets(cls, declaration_of(cls, key.quantizer_id))
    signs = (True,) if key.target is QuantizationTarget.Weights else (True, False)
    for width, signed, arguments in itertools.product(TABLE_WIDTHS, signs, argument_sets):
        fields = {f"{prefix}_quantization_method": key.method, f"{prefix}_n_bits": width}
        params = {} if key.target is QuantizationTarget.Weights else {SIGNED: signed}
        config = _CONFIGS[prefix].model_validate({**fields, f"{prefix}_quantization_params": params})
        try:
            made.append(Table(width, arguments, tuple(adapter.build(cls, config, (), arguments).levels), signed))
        except TrainableError:
            continue  # there is no such table
    return tuple(made)


@dataclass(frozen=True)
class Subject:
    """A quantizer class on one of its grids, in its backend: what a law is tried on."""

    adapter: Adapter
    cls: type[Any]
    key: Key
    way: Way = PLAIN
    thorough: bool = False
    layer: str = "tensor"

    def under(self, case: Case, *, thorough: bool = False) -> Subject:
        """Return the subject as the case's calls see it: inputs are given to it in the case's way."""
        return replace(self, way=case.way, thorough=thorough)

    def __str__(self) -> str:
        return f"{self.key.quantizer_id}-{self.key.target}-{self.key.method}"

    @property
    def weights(self) -> bool:
        """Whether it quantizes weights."""
        return self.key.target.name == "Weights"

    @functools.cached_property
    def method(self) -> Method:
        """What its training method declares."""
        return declaration_of(self.cls, self.key.quantizer_id)

    @functools.cached_property
    def argument_sets(self) -> list[dict[str, Any]]:
        """The constructor's further arguments to try: those that the method declares and the class takes, and none."""
        return _argument_sets(self.cls, self.method)

    @property
    def tables(self) -> Sequence[Table]:
        """The tables of a class that quantizes to one; none for other grids."""
        adapter: Any = self.adapter
        cls: Any = self.cls
        return tables_of(adapter, cls, self.key) if self.key.method in LUT_METHODS else ()

    @property
    def width(self) -> int:
        """A width that the class takes, of four bits where it does."""
        return min((each.width for each in self.tables), key=lambda width: abs(width - 4), default=4)

    @property
    def random(self) -> bool:
        """Whether its values in training are random."""
        return self.method.training_forward == "random"

    def state(self, quantizer: Any, case: Case) -> State:
        """Return the numbers that decide what the case's quantizer gives when it is called next."""
        return State(
            grids=self.grids(quantizer, case),
            width=quantizer.selected_width,
            variables=variables(quantizer),
            arguments=quantizer.get_arguments(),
            steps=case.steps + int(self.adapter.counts_calls),
            tie_rule=self.adapter.tie_rule,
        )

    def grids(self, quantizer: Any, case: Case) -> dict[int, QParams]:
        """Return the grids, by width, that the case's tensor is quantized on; none where nobody can say them."""
        if not self.method.computes_grid:
            return {width: grid(quantizer, width) for width in quantizer.widths}
        oracle = self.method.oracle
        if oracle is None or oracle.grid is None or not case.x.size:
            return {}
        made = oracle.grid(case.x, quantizer.quantization_config, quantizer.get_arguments())
        return {quantizer.selected_width: made}

    @property
    def element_by_element(self) -> bool:
        """Whether an element's value follows from the element alone; a method declares it where it does not."""
        return bool(getattr(self.method, "depends_on", "element") == "element")

    @property
    def deploys_values(self) -> bool:
        """Whether the method deploys its values in the place of the float tensor."""
        return bool(getattr(self.method, "deploys_values", False))

    def normal(self, x: Float32) -> Float32:
        """Return an input without numbers that a backend may treat as zero in one call and not in another."""
        if self.adapter.subnormals:
            return x
        return np.where(np.abs(x) < SMALLEST_SQUARE, np.float32(0), x)

    def schedule_end(self, quantizer: Any) -> int | None:
        """Return from how many counted training steps on training values are the deployed ones; None: they never are.

        A built-in's declaration says it, a plugin's quantizer by its attribute ``schedule_end``.
        """
        if self.method.schedule_end is not None:
            return self.method.schedule_end(quantizer.get_arguments())
        end = getattr(quantizer, "schedule_end", None)
        return None if end is None else int(end)

    def fresh(self, case: Case, config: Config | None = None, shape: tuple[int, ...] | None = None) -> Any:
        """Return a quantizer with the case's arguments, right after initialization."""
        given = config or case.config, case.x.shape if shape is None else shape, case.arguments
        return self.adapter.build(self.cls, *given, name=self.layer)

    def quantizer(self, case: Case, shape: tuple[int, ...] | None = None) -> Any:
        """Return the case's quantizer: initialized, with its variables changed and its schedule advanced."""
        quantizer = self.fresh(case, shape=shape)
        move(quantizer, case.factors)
        for _ in range(case.steps):
            quantizer.advance()
        return quantizer

    def run(
        self,
        quantizer: Any,
        x: ArrayLike,
        *,
        training: bool = False,
        dtype: str = "float32",
        device: str | None = None,
        upstream: NDArray[Any] | None = None,
    ) -> Run:
        """Call a quantizer; see `Adapter.run`."""
        place = self.adapter.devices[0] if device is None else device
        return self.adapter.run(
            quantizer, np.asarray(x), training=training, dtype=dtype, device=place, upstream=upstream, way=self.way
        )

    def deployed(self, quantizer: Any, x: ArrayLike, dtype: str = "float32") -> NDArray[Any]:
        """Return what ``quantizer.convert2inferable()`` gives for `x`, or for its values where these are deployed."""
        x = self.values(quantizer, x) if self.deploys_values else x
        return self.adapter.deployed(quantizer)(np.asarray(x), dtype, self.way).values

    def values(self, quantizer: Any, x: ArrayLike, *, training: bool = False) -> NDArray[Any]:
        """Return a quantizer's values for `x`."""
        return self.run(quantizer, x, training=training).values


SMALLEST_SQUARE = 2.0**-63
"""Below it, a product of two numbers may be subnormal."""


def grid_names(quantizer: Any) -> set[str]:
    """Return the names of the variables that the quantizer's grids are computed from."""
    own = {id(v) for width in quantizer.widths for v in quantizer.grid_variables(width).values()}
    return {name for name in quantizer.variable_names if id(quantizer.get_quantizer_variable(name)) in own}


def move(quantizer: Any, factors: tuple[float, ...]) -> None:
    """Change variables as training could: multiply those of the grid by the factors, add factor - 1 to the others."""
    grid = grid_names(quantizer)

    def factor(index: int, shape: tuple[int, ...]) -> Float32:
        return np.resize(np.roll(np.array(factors, np.float32), -index), shape)

    for width in quantizer.widths if quantizer.grid_parameters else ():  # these stand for numbers that are multiplied
        numbers = quantizer.grid_numbers(width)
        moved = {key: value * factor(index, value.shape) for index, (key, value) in enumerate(numbers.items())}
        if THRESHOLD in moved:  # what was too small to be decoded has no logarithm
            moved[THRESHOLD] = np.maximum(moved[THRESHOLD], np.finfo(np.float32).tiny)
        for key, value in quantizer.encoded(moved).items():
            quantizer.assign(quantizer.grid_variables(width)[key], value)
    for index, name in enumerate(quantizer.variable_names):
        if name in grid and quantizer.grid_parameters:
            continue
        variable = quantizer.get_quantizer_variable(name)
        value = np.asarray(quantizer.to_numpy(variable), np.float32)
        by = factor(index, value.shape)
        quantizer.assign(variable, (value * by if name in grid else value + (by - 1)).astype(np.float32))


def with_fields(config: Config, **changes: Any) -> Config:
    """Return a config with some fields changed, checked again."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    return type(config)(**{**fields, **changes})


def uncalibrated(config: Config) -> Config:
    """Return a config without quantization params, but for a sign that no calibration decides."""
    kept = {} if config.calibrated else config.quantization_params
    return with_fields(config, **{f"{config.prefix}_quantization_params": kept})


def grid(quantizer: Any, width: int | None = None) -> QParams:
    """Return the grid of the quantizer's numbers, computed by core and not by the quantizer."""
    config = quantizer.quantization_config
    width = quantizer.selected_width if width is None else width
    return qparams.from_variables(
        quantizer.grid_numbers(width),
        config.quantization_method,
        width,
        signed=quantizer.signed,
        min_threshold=config.min_threshold,
        channels_axis=config.channels_axis,
        levels=quantizer.levels,
    )


def ends(at: QParams, ndim: int) -> tuple[Float32, Float32]:
    """Return the first and the last code that a grid has, counted from zero, shaped to broadcast."""
    if at.levels:
        return np.asarray(at.levels[0], np.float32), np.asarray(at.levels[-1], np.float32)
    return affine.ends(at, ndim)


def variables(quantizer: Any) -> dict[str, NDArray[Any]]:
    """Return copies of a quantizer's variables."""
    return {
        name: np.array(quantizer.to_numpy(quantizer.get_quantizer_variable(name))) for name in quantizer.variable_names
    }


def moves_in_a_call(subject: Subject, case: Case, x: NDArray[Any]) -> bool:
    """Return whether a call in training moves a variable, as a threshold that is a moving average."""
    quantizer = subject.quantizer(case)
    before = variables(quantizer)
    subject.values(quantizer, x, training=True)
    return any(not np.array_equal(value, before[name]) for name, value in variables(quantizer).items())


def granularity(config: Config) -> set[str]:
    """Return what has a threshold of its own, in the words of a report."""
    if not isinstance(config, TrainableQuantizerWeightsConfig) or config.blocks is None:
        return {"per tensor" if config.channels_axis is None else "per channel"}
    words = {"per group": config.weights_group_size, "per expert": config.weights_expert_axis}
    return {said for said, value in words.items() if value is not None}


def rows(config: Config, values: NDArray[Any]) -> NDArray[Any]:
    """Return a tensor as a quantizer of this config sees it: with one row per block, where it has blocks."""
    return values if config.blocks is None else config.blocks.rows(values)


def tensor(config: Config, values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the tensor of a shape that `rows` was called on."""
    return values if config.blocks is None else config.blocks.tensor(values, shape)


def fixed_axes(config: Config, ndim: int) -> set[int]:
    """Return the axes of a tensor whose sizes decide how many numbers its quantizer has."""
    blocks = config.blocks
    if blocks is not None:
        several = (*blocks.axes, *(() if blocks.group_axis is None else (blocks.group_axis,)))
        return {axis % ndim for axis in several}
    return set() if config.channels_axis is None else {config.channels_axis % ndim}


def free_axes(case: Case) -> list[int]:
    """Return the axes of a case's tensor along which it may have another size."""
    axes = range(case.x.ndim)  # of a tensor without axes none can be fixed
    fixed = fixed_axes(case.config, case.x.ndim) if axes else set()
    return [axis for axis in axes if axis not in fixed]


HOSTILE = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1.0, -1.0, 0.0], np.float32)


def hostile_step(subject: Subject, quantizer: Any, case: Case, step: int) -> None:
    """Take an optimizer step with huge, infinite and NaN gradients; the case's upstream decides which."""
    first = step + int(np.abs(case.upstream).sum() * 8)
    gradients = {
        name: np.resize(np.roll(HOSTILE, -first - place), value.shape).astype(np.float32)
        for place, (name, value) in enumerate(variables(quantizer).items())
    }
    subject.adapter.descend(quantizer, gradients)


@dataclass(frozen=True)
class Counterexample:
    """A case for which a law does not hold, made as small as possible, with all that is needed to repeat it.

    Parameters
    ----------
    law, reason : str
        The law, and its reason.
    quantizer : str
        Import path of the class.
    subject : Subject
        What was checked.
    case : Case or None
        The case; None for a law about the class.
    what, expected, got : str
        What was compared, what was expected, and what was found.
    """

    law: str
    reason: str
    quantizer: str
    subject: Subject
    case: Case | None
    what: str
    expected: str
    got: str

    def document(self) -> Document:
        """Return the counterexample as a JSON document, which `replay` takes."""
        return {
            "law": self.law,
            "backend": self.subject.key.backend,
            "quantizer": self.quantizer,
            "method": self.subject.key.method.name,
            "case": None if self.case is None else self.case.document(),
            "what": self.what,
            "expected": self.expected,
            "got": self.got,
        }

    def __str__(self) -> str:
        lines = [("law", f"{self.law}: {self.reason}"), ("quantizer", f"{self.quantizer} ({self.subject})")]
        if self.case is not None:
            lines.append(("config", self.case.config.model_dump_json(exclude_defaults=True)))
            if self.case.arguments:
                lines.append(("arguments", json.dumps(self.case.arguments)))
            if set(self.case.factors) != {1.0}:
                lines.append(("variables", f"times {list(self.case.factors)}"))
            if self.case.way != PLAIN:
                lines.append(("way", f"{self.case.way}"))
            if self.case.repeats[1] > 1:
                axis, times = self.case.repeats
                lines.append(("size", f"{self.case.x.size} elements: the input below, {times} times along axis {axis}"))
            if self.case.steps:
                lines.append(("schedule", f"{self.case.steps} training steps counted"))
            lines.append(("input", shown(self.case.part[0])))
        lines += [("compared", self.what), ("expected", self.expected), ("got", self.got)]
        if self.case is not None:
            lines.append(("repeat", f"replay({json.dumps(self.document())!r})"))
        return "\n".join(f"{name:<10} {text}" for name, text in lines)


MOST_SHOWN = 4096


def shown(value: object) -> str:
    """Return a value as text that can be pasted into Python."""
    if isinstance(value, np.ndarray):
        if value.size > MOST_SHOWN:
            first = ", ".join(map(str, value.reshape(-1)[:MOST_SHOWN].tolist()))
            return f"{first}, ... ({value.dtype} of shape {value.shape})"
        listed = json.dumps(value.tolist()).replace("Infinity", "np.inf").replace("NaN", "np.nan")
        return f"np.array({listed}, np.{value.dtype})"
    return str(value)
