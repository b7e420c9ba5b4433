"""Cases: configs on every grid, changed variables, tensors full of ties, ends and special numbers.

A case is drawn by hypothesis, or it is a corner: made from random bytes to meet one condition that draws seldom meet,
such as a tensor with more elements than a fast path takes.

Arrays are decoded from drawn bytes: one draw for a whole array is cheap, and hypothesis can make it smaller. Zero bytes
decode to the simplest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from trainable_core import qparams
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.conformance.adapter import PLAIN, Way
from trainable_core.conformance.case import Case, Config, Subject, Table, free_axes, tensor
from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import Float32, Float64, QParams
from trainable_core.reference import table
from trainable_core.reference.oracle import middles
from trainable_core.validation import MAX_THRESHOLD

F32 = np.finfo(np.float32)


@dataclass(frozen=True)
class Kind:
    """Which cases a law is tried on.

    Parameters
    ----------
    bits : tuple of int
        Fewest and most bits of the grid.
    exact : bool
        Whether every scale is a power of two, so that ``x / scale`` is exact and ties are exactly at ties.
    moderate : bool
        Whether thresholds stay between 2**-10 and 2**10 and change by a factor below 4, so that no sum of gradients
        leaves the normal float32 numbers; otherwise they are anything that a config accepts.
    finite : bool
        Whether the input has no infinities and no magnitudes beyond ``2**60``.
    per_channel : bool or None
        Whether there is one threshold per channel; None tries both.
    least : int
        Fewest dimensions of the tensor.
    rank : int or None
        Number of its dimensions, where the law is about one.
    tensor : bool
        Whether the law is about tensors, so that their layout and their size are varied.
    bound : bool
        Whether thresholds at their lower bound, and below it, are tried besides.
    fixed_input : bool
        Whether inputs that need no gradient are tried besides.
    blocks : bool or None
        Whether weights have a threshold for each group of a channel, or for each expert; None tries it now and then,
        where `per_channel` is not said.
    """

    bits: tuple[int, int] = (1, 16)
    exact: bool = False
    moderate: bool = False
    finite: bool = False
    per_channel: bool | None = None
    least: int = 0
    rank: int | None = None
    tensor: bool = True
    bound: bool = False
    fixed_input: bool = False
    blocks: bool | None = None


@dataclass(frozen=True)
class Corner:
    """A condition that a case is made to meet.

    Parameters
    ----------
    rank : int or None
        Number of dimensions.
    bits : int or None
        Width of the grid.
    size : int
        Number of elements that the tensor has more of; 0 leaves it as drawn.
    empty : bool
        Whether it has no elements.
    bound : bool
        Whether thresholds are at their lower bound or below it.
    way : Way or None
        How the input is given.
    """

    rank: int | None = None
    bits: int | None = None
    size: int = 0
    empty: bool = False
    bound: bool = False
    way: Way | None = None


ANYWHERE = Corner()
DENSE_4D, DENSE_5D = 4, 5


def corners(subject: Subject, kind: Kind) -> list[Corner]:
    """Return the conditions that a law is tried under, those that cost least first."""
    adapter = subject.adapter
    least = max(kind.least, int(kind.per_channel or 0))
    made = [Corner(bits=bits) for bits in (1, 2, 8, 16) if kind.bits[0] <= bits <= kind.bits[1]]
    made += [Corner(rank=rank) for rank in (0, 1, 4, 5) if rank >= least and kind.rank is None]
    made += [Corner(bound=True)] * 2 if kind.bound else []
    if not kind.tensor:
        return made
    made += [Corner(rank=2, empty=True)]
    ranks = {"channels_last": DENSE_4D, "channels_last_3d": DENSE_5D}
    for layout in adapter.layouts[1:]:
        made.append(Corner(rank=ranks.get(layout, 2), way=Way(layout=layout)))
        made.append(Corner(rank=ranks.get(layout, 3), way=Way(upstream=layout)))
    if kind.fixed_input:
        made += [Corner(way=Way(input_gradient=False)), Corner(rank=4, way=Way(input_gradient=False))]
    return made + [Corner(rank=4, size=size) for size in adapter.sizes]


class Source:
    """Numbers decoded from drawn bytes; zero bytes give the first and simplest choice."""

    def __init__(self, drawn: bytes) -> None:
        self._bytes = np.frombuffer(drawn, np.uint8)
        self._next = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return the next `count` bytes."""
        self._next += count
        return self._bytes[self._next - count : self._next]

    def choice(self, options: Sequence[T]) -> T:
        """Return one of up to 256 options."""
        return options[int(self.take(1)[0]) % len(options)]

    def words(self, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint32]]:
        """Return for each of `size` numbers a choice of kind, a shift in ulps, and 32 random bits."""
        taken = self.take(WORD * size).reshape(size, WORD)
        ulps = (taken[:, 1].astype(np.int64) + 2) % 5 - 2
        return taken[:, 0], ulps, taken[:, 2:].copy().view(np.uint32).reshape(size)


T = TypeVar("T")
WORD = 6  # bytes of one number
HEADER = 40  # bytes that decide everything but arrays: more than the choices below
RANGE_WORDS = 3  # arrays of numbers that a range takes at most

DIMENSIONS = (1, 2, 3, 2, 3, 0, 2, 4, 1, 2, 3, 4, 3, 0, 2, 5)
MANY_DIMENSIONS = 4
FEW = 3  # largest size of a tensor with many dimensions: hypothesis draws no more than 8 KiB
LONG = 6  # size of an axis that has groups of several sizes
COMPILED = (3, 2, 4, 2, 1)
"""Sizes where every new shape costs a compilation; corners and groups have further ones."""
SIZES = (1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 0)
# 0 and numbers below 2**-100 leave the bound to the library; 1e-3 and 0.1 are not float32 numbers.
MIN_THRESHOLDS = (2.0**-16, 0.0, 1e-3, 2.0**-16, 0.0, 0.1, 2.0**-16, 0.0, 2.0**-120, 1.0, 2.0**-16, 2.0**100)
FACTORS = (1.0, 0.75, 1.3, 2.0, 0.51, 1.0 + 2.0**-23, 3.7)
EXACT_FACTORS = (1.0, 2.0, 0.5, 8.0)


def nudged(values: Float32, ulps: NDArray[np.int64]) -> Float32:
    """Return float32 values shifted by a few units in the last place; infinities and NaN stay."""
    moved = values.copy()
    for by in (-2, -1, 1, 2):
        for _ in range(abs(by)):
            moved[ulps == by] = np.nextafter(moved[ulps == by], np.float32(np.copysign(np.inf, by)))
    return np.where(np.isfinite(values), moved, values)


def positives(source: Source, size: int, kind: Kind) -> Float32:
    """Return valid thresholds: decimals, powers of two and their neighbours, any float32 up to 2**100."""
    which, ulps, payload = source.words(size)
    if kind.exact:
        return np.exp2(((payload + 10) % 21).astype(np.float32) - 10).astype(np.float32)
    decimals = ((payload % 4000).astype(np.float32) + 1) * np.float32(1e-2)
    powers = nudged(np.exp2((payload % 20).astype(np.float32) - 10).astype(np.float32), ulps)
    anything = np.abs(payload.view(np.float32))
    which = which % (2 if kind.moderate else 4)
    extreme = np.exp2(np.where(payload % 2, 100, -149).astype(np.float64)).astype(np.float32)
    values = np.choose(which, [decimals, powers, extreme, anything]).astype(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(1))
    return np.clip(values, F32.smallest_subnormal, np.float32(MAX_THRESHOLD))


def shapes(source: Source, subject: Subject, kind: Kind, corner: Corner) -> tuple[int, ...]:
    """Return a tensor's shape: up to five dimensions, including none, and sizes down to 0."""
    sizes = [source.choice(SIZES) for _ in range(5)]
    if subject.adapter.compiles_shapes:
        sizes = list(COMPILED)
    rank = max(source.choice(DIMENSIONS), kind.least, int(kind.per_channel or 0))
    rank = next((each for each in (corner.rank, kind.rank) if each is not None), rank)
    if rank >= MANY_DIMENSIONS:
        sizes = [min(size, FEW) for size in sizes]
    elif kind.blocks and rank:
        sizes[source.choice(range(rank))] = LONG
    if corner.size:
        sizes = [FEW for _ in sizes]
    if corner.way:
        sizes = [max(size, 1) for size in sizes]
    shape = tuple(sizes[:rank])
    if corner.empty:
        shape = (*shape[:-1], 0) if sizes[4] % 2 else (0, *shape[1:])
    return (*shape[:-1], 2) if kind.per_channel and not any(shape) else shape


def config(
    source: Source, body: Source, subject: Subject, shape: tuple[int, ...], kind: Kind, corner: Corner
) -> Config:
    """Return a calibrated config for a tensor of this shape."""
    axes = [axis for axis in range(-len(shape), len(shape)) if shape[axis] > 0] if subject.weights else []
    wanted = source.choice((True, False)) if kind.per_channel is None else kind.per_channel
    axis = source.choice(axes or [0]) if (wanted or kind.blocks) and axes else None
    low, high = kind.bits
    n_bits = low + int(source.take(1)[0]) % (high - low + 1)
    n_bits = n_bits if corner.bits is None else corner.bits
    if subject.tables:
        n_bits = _width_of_table(subject, n_bits)
    blocks = {} if axis is None else _blocks(source, subject, axis, shape, kind)
    params = _params(source, body, subject, _thresholds(axis, blocks, shape), n_bits, kind)
    levels = _levels(subject, n_bits, signed=bool(params.get(SIGNED, True)))
    if axis is None:
        params = {key: value[0] if isinstance(value, list) else value for key, value in params.items()}
    prefix = "weights" if subject.weights else "activation"
    fields: dict[str, Any] = {
        f"{prefix}_quantization_method": subject.key.method,
        f"{prefix}_n_bits": n_bits,
        f"{prefix}_quantization_params": {**params, LUT_VALUES: levels} if levels else params,
    }
    bound = source.choice(MIN_THRESHOLDS)
    if not (kind.exact or kind.moderate):
        fields["min_threshold"] = bound
    elif corner.bound:
        fields["min_threshold"] = source.choice(BOUNDS) * _largest(params)
    if axis is not None:
        fields |= {"weights_per_channel_threshold": True, "weights_channels_axis": axis, **blocks}
    widths = dict.fromkeys(low + int(byte) % (high - low + 1) for byte in source.take(3))
    if source.choice((False, True)) and not subject.tables:
        fields[f"{prefix}_quantization_candidates"] = [{"n_bits": width} for width in widths]
    return (TrainableQuantizerWeightsConfig if subject.weights else TrainableQuantizerActivationConfig)(**fields)


def _width_of_table(subject: Subject, n_bits: int) -> int:
    """Return a width of which the class has a table, with every sign that it has any with."""
    signs = {each.signed for each in subject.tables}
    made = {(each.width, each.signed) for each in subject.tables}
    widths = sorted({width for width, _ in made if all((width, signed) in made for signed in signs)})
    return n_bits if n_bits in widths else widths[n_bits % len(widths)]


def _tables_of_width(subject: Subject, n_bits: int, *, signed: bool) -> list[Table]:
    """Return the tables of a width with a sign, or without."""
    return [each for each in subject.tables if each.width == n_bits and each.signed is signed]


def _levels(subject: Subject, n_bits: int, *, signed: bool) -> list[int]:
    """Return the first table of a width, with a sign or without; nothing for other grids."""
    return list(_tables_of_width(subject, n_bits, signed=signed)[0].levels) if subject.tables else []


def _of_table(subject: Subject, chosen: Config, arguments: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Return the config with the levels that these arguments make, or with those of others that make any."""
    tables = _tables_of_width(subject, chosen.n_bits, signed=chosen.signed)
    found = next((each for each in tables if each.arguments == arguments), tables[0])
    return chosen.with_params({**chosen.quantization_params, LUT_VALUES: list(found.levels)}), found.arguments


def _may_have_blocks(subject: Subject, kind: Kind) -> bool:
    """Return whether weights may be cut into blocks."""
    may = subject.weights and subject.adapter.blocks and kind.per_channel is None and kind.blocks is not False
    return may and not subject.tables  # mctq deploys tables per tensor and per channel


def _blocks(source: Source, subject: Subject, axis: int, shape: tuple[int, ...], kind: Kind) -> dict[str, int]:
    """Return the fields of a config that cut channels along `axis` into groups, or give each expert its own."""
    often = (3, 1, 2) if kind.blocks else (0, 0, 1, 0, 2, 0, 3, 0)
    wanted = source.choice(often)  # bits: groups, experts
    places = [each for each in range(len(shape)) if each != axis % len(shape) and shape[each] > 0]
    if not _may_have_blocks(subject, kind) or not places:
        return {}
    chosen = source.choice(places)
    first = max(places, key=lambda each: shape[each]) if kind.blocks else chosen
    others = [each for each in places if each != first]
    fields: dict[str, int] = {}
    if wanted & 1:
        sizes = [size for size in range(1, shape[first] + 1) if shape[first] % size == 0]
        several = sizes[1:-1] if kind.blocks else []
        size = source.choice([*several, *several, *sizes, shape[first] + 1])
        fields = {"weights_group_axis": first, "weights_group_size": size}
    if wanted & 2 and (others or not fields):
        fields["weights_expert_axis"] = others[0] if fields else first
    return fields


def _thresholds(axis: int | None, blocks: dict[str, int], shape: tuple[int, ...]) -> int:
    """Return how many thresholds there are."""
    if axis is None:
        return 1
    size, expert = blocks.get("weights_group_size"), blocks.get("weights_expert_axis")
    groups = max(shape[blocks["weights_group_axis"]] // size, 1) if size is not None else 1
    return shape[axis] * groups * (1 if expert is None else shape[expert])


BOUNDS = (1.0, 1.5, 0.75)  # of the largest threshold: so several channels are at the bound, below it, or above


def _largest(params: dict[str, Any]) -> float:
    """Return the largest threshold, or the largest width of a range."""
    numbers = {key: np.atleast_1d(np.asarray(value, np.float32)) for key, value in params.items() if key != SIGNED}
    width = numbers[THRESHOLD] if THRESHOLD in numbers else numbers[RANGE_MAX] - numbers[RANGE_MIN]
    return float(width.max())


def _params(source: Source, body: Source, subject: Subject, size: int, n_bits: int, kind: Kind) -> dict[str, Any]:
    """Return params, each a list with one number per channel."""
    first, second, below = positives(body, size, kind), positives(body, size, kind), body.words(size)[2] % 2**n_bits
    signed = source.choice((True, False))
    form = source.choice(("range", "low", "high", THRESHOLD))
    if subject.key.method is not QuantizationMethod.UNIFORM:
        params: dict[str, Any] = {THRESHOLD: first.astype(float).tolist()}
        return params if subject.weights else {**params, SIGNED: signed}
    if kind.exact:  # `first` is the scale; both ends are multiples of it
        low, high = -(below * first), (2**n_bits - 1 - below) * first
        return {RANGE_MIN: low.astype(float).tolist(), RANGE_MAX: high.astype(float).tolist()}
    if form == THRESHOLD:
        return {THRESHOLD: first.astype(float).tolist(), SIGNED: signed}
    zero = np.zeros_like(first)
    low, high = {"range": (-first, second), "low": (-first, zero), "high": (zero, first)}[form]
    return {RANGE_MIN: low.astype(float).tolist(), RANGE_MAX: high.astype(float).tolist()}


def grid_after(config: Config, factors: tuple[float, ...], width: int) -> QParams:
    """Return the grid of a config's params after the variables changed; see `case.move`."""
    values = qparams.variables_from_params(config.quantization_params, config.quantization_method)
    size = max(value.size for value in values.values())
    names = qparams.variable_names(config.quantization_method)
    moved: dict[str, Float32] = {}
    for index, name in enumerate(names):
        value = values[name] if config.channels_axis is None else np.broadcast_to(values[name].reshape(-1), size)
        by = np.resize(np.roll(np.array(factors, np.float32), -index), value.shape).astype(np.float32)
        moved[name] = np.asarray(value * by, np.float32)
    return qparams.from_variables(
        moved,
        config.quantization_method,
        width,
        signed=config.signed,
        min_threshold=config.min_threshold,
        channels_axis=config.channels_axis,
        levels=tuple(config.quantization_params.get(LUT_VALUES, ())),
    )


_MAGNITUDES = [0.0, 1.0, np.inf, float(F32.max), float(F32.tiny), float(F32.smallest_subnormal), 1e-30, 1e30]
SPECIAL = np.array([sign * magnitude for magnitude in _MAGNITUDES for sign in (1.0, -1.0)], np.float32)
FINITE_LIMIT = np.float32(2.0**60)


def inputs(source: Source, grid: QParams, shape: tuple[int, ...], kind: Kind) -> Float32:
    """Return a tensor with codes and ties of the grid, their neighbours, range ends, other numbers and special ones."""
    size = int(np.prod(shape, dtype=np.int64))
    which, ulps, payload = source.words(size)
    which = which % 8
    along = grid.along(len(shape))
    low, high = (
        np.broadcast_to(end - along.zero_point, shape).reshape(size) for end in (grid.quant_min, grid.quant_max)
    )
    code = low + (payload.astype(np.int64) - low + 3) % (high - low + 7) - 3  # payload 0 is zero; 3 steps beyond
    end = np.where(payload % 2, low, high) + (payload // 2 % 3).astype(np.float32) * np.float32(0.5) - np.float32(0.5)
    anywhere = low + (payload.astype(np.float64) / 2.0**32 * 1.5 - 0.25) * (high - low)
    # Of eight kinds: a code, two of ties, an end, two of anything around the range; then special numbers, any bits.
    steps = np.choose(which, [code, code + 0.5, code + 0.5, end, anywhere, anywhere, code, code])
    if grid.levels:
        steps = _steps_of_table(grid, which, payload, np.asarray(anywhere, np.float64))
    with np.errstate(over="ignore", under="ignore"):
        values = (steps.astype(np.float32).reshape(shape) * along.scale).astype(np.float32).reshape(size)
    values = nudged(values, np.where(which <= 1, 0, ulps))  # codes, and one kind of ties, stay as they are
    special = SPECIAL[payload % len(SPECIAL)]
    values = np.choose(which, [values] * 6 + [special, payload.view(np.float32)])
    values = np.where(np.isnan(values), np.float32(-1.5), values)
    if kind.finite:
        values = np.clip(values, -FINITE_LIMIT, FINITE_LIMIT)
    return values.astype(np.float32).reshape(shape)


def _steps_of_table(grid: QParams, which: NDArray[np.uint8], payload: NDArray[np.uint32], anywhere: Float64) -> Float64:
    """Return what `inputs` makes of a grid for a table: levels, what is half way between two, its ends, the edges."""
    levels, between = np.asarray(grid.levels, np.float64), middles(grid)
    level, tie = levels[payload % levels.size], between[payload % between.size]
    end = np.concatenate([levels[[0, -1]], table.edges(grid.levels)])[payload % 4]
    return np.asarray(np.choose(which, [level, tie, tie, end, anywhere, anywhere, level, level]))


def upstreams(source: Source, shape: tuple[int, ...]) -> Float32:
    """Return a gradient: eighths between -4 and 4, so that products with small integers are exact."""
    drawn = source.take(int(np.prod(shape, dtype=np.int64))).astype(np.float32)
    return (((drawn + 40) % 65 - 32) / 8).astype(np.float32).reshape(shape)


def factors(source: Source, kind: Kind) -> tuple[float, ...]:
    """Return how the variables have changed: by a few uneven factors; on exact grids by one power of two."""
    if kind.exact:
        return (source.choice(EXACT_FACTORS),)
    several = [source.choice(FACTORS) for _ in range(3)]
    return tuple(several[: source.choice((1, 2, 3))])


def ways(source: Source, subject: Subject, kind: Kind) -> Way:
    """Return how the input is given: mostly contiguous."""
    input_layout, upstream_layout = source.choice((0, 0, 0, 1)), source.choice((0, 0, 0, 1))
    layouts = subject.adapter.layouts
    of_input, of_upstream = source.choice(layouts), source.choice(layouts)
    if not kind.tensor:
        return PLAIN
    return Way(of_input if input_layout else layouts[0], of_upstream if upstream_layout else layouts[0])


def made(
    header: bytes, draw_body: Callable[[int], bytes], subject: Subject, kind: Kind, corner: Corner = ANYWHERE
) -> Case:
    """Return the case that bytes stand for.

    Parameters
    ----------
    header : bytes
        `HEADER` bytes, which decide everything but arrays.
    draw_body : callable
        From a number of bytes to as many bytes, for the arrays.
    subject : Subject
        What the case is for.
    kind : Kind
        Which cases the law is tried on.
    corner : Corner
        What the case has to meet.
    """
    source = Source(header)
    way = ways(source, subject, kind) if corner.way is None else corner.way
    shape = shapes(source, subject, kind, corner)
    size = int(np.prod(shape, dtype=np.int64))
    thresholds = max(*shape, 1, 1)
    if _may_have_blocks(subject, kind):  # a block may be as small as an element
        thresholds = math.prod(max(each, 1) for each in shape)
    body = Source(draw_body(WORD * RANGE_WORDS * thresholds + (WORD + 1) * size))
    chosen = config(source, body, subject, shape, kind, corner)
    by = factors(source, kind)
    arguments = source.choice(subject.argument_sets)
    if subject.tables:
        chosen, arguments = _of_table(subject, chosen, arguments)
    widths = [chosen.n_bits, *(candidate.n_bits for candidate in chosen.candidates or [])]
    grid = grid_after(chosen, by, source.choice(widths))
    laid_out = shape if chosen.blocks is None else chosen.blocks.layout(shape).rows
    x, upstream = tensor(chosen, inputs(body, grid, laid_out, kind), shape), upstreams(body, shape)
    if subject.method.computes_grid:
        chosen = _without_numbers(chosen)
    if way.layout == EXPANDED and shape:
        x = np.broadcast_to(x[:1], shape).copy()
    if way.upstream == EXPANDED:
        upstream = (
            np.broadcast_to(upstream.reshape(-1)[:1].reshape((1,) * len(shape)), shape).copy() if size else upstream
        )
    case = Case(chosen, x, upstream, by, source.choice(range(5)), dict(arguments), way)
    if not corner.size or not size:
        return case
    return case.repeated(free_axes(case)[0], corner.size // size + 1)


def _without_numbers(chosen: Config) -> Config:
    """Return the config of a method that computes its grid: with a sign at most."""
    kept = {key: value for key, value in chosen.quantization_params.items() if key == SIGNED}
    kept = {} if chosen.quantization_method is QuantizationMethod.UNIFORM else kept
    return chosen.with_params(kept)


EXPANDED = "expanded"


@st.composite
def cases(draw: DrawFn, subject: Subject, kind: Kind) -> Case:
    """Return a case for a quantizer class on one of its grids."""

    def body(length: int) -> bytes:
        return draw(st.binary(min_size=length, max_size=length))

    return made(body(HEADER), body, subject, kind)


def corner_case(random: np.random.Generator, subject: Subject, kind: Kind, corner: Corner) -> Case:
    """Return a case in a corner, made from random bytes."""
    return made(random.bytes(HEADER), random.bytes, subject, kind, corner)


# ---- making a counterexample smaller --------------------------------------------------------------------------------


def simpler(case: Case) -> Iterator[Case]:
    """Yield cases that are simpler than this one, the simplest first."""
    if case.repeats[1] > 1:
        for times in (1, case.repeats[1] // 2):
            yield (
                replace(case.repeated(case.repeats[0], 1), repeats=(0, 1))
                if times == 1
                else case.repeated(case.repeats[0], times)
            )
    if case.way != PLAIN:
        yield replace(case, way=PLAIN)
    if case.steps:
        yield replace(case, steps=0)
    if set(case.factors) != {1.0}:
        yield replace(case, factors=(1.0,))
    if case.arguments:
        yield replace(case, arguments={})
    if case.repeats[1] > 1:
        return
    for each in free_axes(case):
        size = case.x.shape[each]
        if size > 1:
            for part in (range(size // 2), range(size // 2, size)):
                yield replace(case, x=case.x.take(part, each), upstream=case.upstream.take(part, each))
