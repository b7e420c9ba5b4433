"""Which cells there are: a network, a setting, a method and a seed in a framework; and the recipe of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from problems import PROBLEMS, Problem

SEEDS = range(5)
FRAMEWORKS = ("torch", "keras")


@dataclass(frozen=True)
class Setting:
    """How many bits there are.

    Parameters
    ----------
    name : str
        The heading of a column.
    weights : int
        Bits of the weights.
    activations : int or None
        Bits of the activations; None leaves them float.
    group_size : int or None
        Inputs that share a threshold; None: one threshold per channel.
    """

    name: str
    weights: int
    activations: int | None = None
    group_size: int | None = None


SETTINGS = {
    each.name: each
    for each in (
        Setting("W8A8", 8, 8),
        Setting("W4A4", 4, 4),
        Setting("W3A3", 3, 3),
        Setting("W2A2", 2, 2),
        Setting("W4", 4),
        Setting("W3", 3),
        Setting("W2", 2),
        Setting("W2 g32", 2, group_size=32),
    )
}
ALL = tuple(SETTINGS)
WITH_ACTIVATIONS = ("W8A8", "W4A4", "W3A3", "W2A2")
FEW_BITS = ("W4A4", "W3A3", "W2A2")
CHANNELS = (*WITH_ACTIVATIONS, "W4", "W3", "W2")
TO_FOUR_BITS = ("W4A4", "W3A3", "W2A2", "W4", "W3", "W2")
TABLES = ("W2A2", "W4", "W3", "W2")

IMAGES = ("cnn", "depthwise")
"""Networks with batch normalization, and the fastest: where what differs little from LSQ is tried."""

NOT_TRIED = {"cnn": ("W3", "W2", "W2 g32"), "depthwise": ("W2", "W2 g32"), "transformer": ("W3",), "recurrent": ("W3",)}
"""Settings that would say nothing new about a network: a group of the first two's would be a channel.

Weights alone at 2 bits are beside groups, at 3 bits where they oscillate most.
"""


@dataclass(frozen=True)
class Row:
    """How a cell is quantized and trained, besides its setting.

    Parameters
    ----------
    name : str
        What the tables call it.
    settings : tuple of str
        Where it is tried.
    weights, activations : dict
        Fields of the recipe's sections that differ from LSQ's on a SYMMETRIC grid.
    qparams : float
        Learning rate of what quantizers learn, as a multiple of the weights'.
    trains : bool
        Whether the network is trained after calibration.
    reconstructs : bool
        Whether roundings are learned layer by layer instead.
    networks : tuple of str
        Where it is tried.
    decays : bool
        Whether the learning rate falls to zero by a cosine; otherwise it is constant.
    native : bool
        Whether only this library's own deployed quantizers can express it.
    calibration : str, str
        How thresholds of weights and of activations are calibrated.
    """

    name: str
    settings: tuple[str, ...] = ALL
    weights: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, Any] = field(default_factory=dict)
    qparams: float = 0.1
    trains: bool = True
    reconstructs: bool = False
    networks: tuple[str, ...] = tuple(PROBLEMS)
    decays: bool = True
    native: bool = False
    calibration: tuple[str, str] = ("mse", "mse")


FIXED: dict[str, Any] = {"training_method": "STE"}
OFFSET: dict[str, Any] = {"training_method": "LSQ_PLUS", "method": "UNIFORM"}
SHIFTS: dict[str, Any] = {"training_method": "TQT", "method": "POWER_OF_TWO"}
DYNAMIC: dict[str, Any] = {"training_method": "DYNAMIC", "arguments": {"granularity": "tensor"}}


def _modified(name: str, **arguments: Any) -> dict[str, Any]:
    return {"modifiers": {name: arguments}}


def _schedule(kind: str, start: float, end: float, initial: float, target: float) -> dict[str, Any]:
    """Return a schedule whose times are shares of the training; `recipe` makes them steps."""
    return {"kind": kind, "t_start": start, "t_end": end, "initial_val": initial, "target_val": target}


def _tables(training_method: str, **arguments: Any) -> dict[str, Any]:
    return {"training_method": training_method, "method": "LUT_SYM_QUANTIZER", "arguments": arguments}


def _constant(name: str, weights: dict[str, Any]) -> Row:
    return Row(f"{name}, constant rate", ("W3A3", "W3"), weights, networks=("depthwise",), decays=False)


def _rounding(name: str) -> Row:
    section = {"arguments": {"rounding": name}}
    return Row(f"LSQ {name}", FEW_BITS, section, section, networks=IMAGES)


DAMPENING = _modified("oscillation_dampening", strength=_schedule("cosine", 0, 1, 0.0, 0.3))
FREEZING = _modified("oscillation_freezing", threshold=_schedule("cosine", 0.25, 1, 0.1, 0.01))
GRADUAL = _modified("gradual_quantization", share=_schedule("linear", 0, 0.5, 1.0, 0.0))

COOLING = _schedule("linear", 0, 0.8, 0.2, 0.05)
ROUNDED = {"training_method": "ADAROUND", "arguments": {"beta": _schedule("linear", 0.2, 1, 20.0, 2.0)}}

FLOAT, NEAREST = "float", "nearest"
ROWS = {
    row.name: row
    for row in (
        Row(FLOAT, ("W8A8",), trains=False),
        Row(NEAREST, ALL, FIXED, FIXED, trains=False),
        Row("STE", ALL, FIXED, FIXED),
        Row("STE minmax", FEW_BITS, FIXED, FIXED, calibration=("minmax", "minmax")),
        Row("LSQ"),
        Row("LSQ_PLUS", ALL, OFFSET, OFFSET, qparams=0.01),
        Row("TQT", ALL, SHIFTS, SHIFTS, qparams=10.0),
        Row("PACT", WITH_ACTIVATIONS, FIXED, {"training_method": "PACT"}, qparams=1.0),
        Row("DOREFA", CHANNELS, {"training_method": "DOREFA"}, calibration=("minmax", "mse")),
        Row("APOT", TABLES, _tables("APOT")),
        Row("PARETOQ", ("W2A2", "W2"), _tables("PARETOQ")),
        Row("PARETOQ ternary", ("W2A2", "W2"), _tables("PARETOQ", ternary=True)),
        Row("DKM", TABLES, _tables("DKM", temperature=COOLING), qparams=10.0),
        *map(_rounding, ("ewgs", "fourier", "dsq")),
        Row("LSQ dampening", TO_FOUR_BITS, DAMPENING, networks=IMAGES),
        Row("LSQ freezing", TO_FOUR_BITS, FREEZING, networks=IMAGES),
        _constant("LSQ", {}),
        _constant("LSQ dampening", DAMPENING),
        _constant("LSQ freezing", FREEZING),
        Row("LSQ gradual", FEW_BITS, {}, GRADUAL, networks=IMAGES),
        Row("DYNAMIC", ("W8A8", "W4A4"), {}, DYNAMIC, native=True),
        Row("ADAROUND", ("W4", "W3", "W2", "W2 g32"), ROUNDED, trains=False, reconstructs=True),
    )
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Parameters
    ----------
    framework, network, setting, method : str
        Names in `FRAMEWORKS`, `PROBLEMS`, `SETTINGS` and `ROWS`.
    seed : int
        Of the split, the initialization and the order of batches.
    qparams : float
        Learning rate of what quantizers learn, as a multiple of the weights'.
    """

    framework: str
    network: str
    setting: str
    method: str
    seed: int
    qparams: float

    def __str__(self) -> str:
        """Return a name that the filter of the command line looks into."""
        rate = "" if self.qparams == self.row.qparams else f" x{self.qparams:g}"
        return f"{self.framework}/{self.network}/{self.setting}/{self.method}{rate}/{self.seed}"

    @property
    def problem(self) -> Problem:
        """The network's."""
        return PROBLEMS[self.network]

    @property
    def row(self) -> Row:
        """The method's."""
        return ROWS[self.method]


OSCILLATING = tuple(f"LSQ{kind}{rate}" for rate in (", constant rate", "") for kind in ("", " dampening", " freezing"))
STES = ("STE", "STE minmax")
ORDER: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("cnn", ("W4A4", "W2A2"), (FLOAT, NEAREST, *STES, "LSQ", "TQT", "LSQ_PLUS", "PACT", "DOREFA", "PARETOQ")),
    ("depthwise", ("W3", "W3A3"), (FLOAT, NEAREST, "STE", *OSCILLATING)),
    ("transformer", ("W2", "W2 g32"), (FLOAT, NEAREST, "STE", "LSQ", "ADAROUND")),
    ("transformer", ("W2A2",), (*STES, "LSQ", "LSQ_PLUS")),
    ("recurrent", ("W4A4", "W2A2"), (FLOAT, NEAREST, *STES, "LSQ")),
    *((network, ALL, tuple(ROWS)) for network in PROBLEMS),
)
"""What is run first: what says most."""

RATES = (0.01, 0.1, 1.0, 10.0)
"""Multiples of the weights' learning rate that are tried for what quantizers learn."""
RATED = (("cnn", "W2A2"), ("depthwise", "W3A3"))
RATED_METHODS = ("LSQ", "LSQ_PLUS", "TQT", "PACT", "PARETOQ", "DKM")
RATED_SEEDS = SEEDS[:3]


def cells(seeds: range = SEEDS) -> list[Cell]:
    """Return all cells, in the order in which they are run: PyTorch's, the learning rates, then Keras's."""
    found: dict[Cell, None] = {}
    for framework in FRAMEWORKS:
        for network, settings, methods in ORDER:
            for seed in seeds:
                for setting in settings:
                    if setting in NOT_TRIED[network]:
                        continue
                    for row in map(ROWS.__getitem__, methods):
                        if network in row.networks and (setting in row.settings or row.name == FLOAT):
                            column = row.settings[0] if row.name == FLOAT else setting
                            found[Cell(framework, network, column, row.name, seed, row.qparams)] = None
        if framework == "torch":
            found |= dict.fromkeys(_rates())
    return list(found)


def _rates() -> Iterator[Cell]:
    for network, setting in RATED:
        for seed in RATED_SEEDS:
            for method in RATED_METHODS:
                if setting not in ROWS[method].settings:
                    continue
                for rate in RATES:
                    yield Cell("torch", network, setting, method, seed, rate)


def is_short(cell: Cell) -> bool:
    """Return whether a cell is part of the short form: one seed of the first two lines of `ORDER`."""
    first = any(
        cell.network == network and cell.setting in settings and cell.method in methods
        for network, settings, methods in ORDER[:2]
    )
    return cell.seed == 0 and cell.qparams == cell.row.qparams and (first or cell.method == FLOAT)


def recipe(cell: Cell) -> dict[str, Any]:
    """Return how a cell's network is quantized: first and last layers with 8 bits, fixed, whatever the method."""
    setting, row = SETTINGS[cell.setting], cell.row
    start = {"method": "SYMMETRIC", "training_method": "LSQ"}
    weights = {**start, "n_bits": setting.weights, **row.weights}
    plain = {**start, "training_method": "STE", "n_bits": 8, "arguments": {}, "modifiers": {}}
    ends = {"weights": {**plain, "granularity": "channel"}, "activations": plain}
    made: dict[str, Any] = {
        "weights": weights if setting.group_size is None else {**weights, "group_size": setting.group_size},
        "calibration": dict(zip(("weights", "activations"), row.calibration, strict=True)),
        "fold_batch_norm": False,
        "target": "native" if row.native or setting.group_size else "mctq",
    }
    kinds = ("weights",) if setting.activations is None else ("weights", "activations")
    if setting.activations is not None:
        made["activations"] = {**start, "n_bits": setting.activations, **row.activations}
    rules = []
    for name, changed in cell.problem.ends:
        changes = {kind: ends[kind] for kind in changed if kind in kinds}
        if changes:
            rules.append({"match": {"name": name}, **changes})
    return _in_steps({**made, "rules": rules}, cell.problem.steps)


def _in_steps(value: Any, steps: int) -> Any:
    """Return a recipe whose schedules are in steps."""
    if isinstance(value, dict):
        timed = {key: round(value[key] * steps) for key in ("t_start", "t_end") if key in value}
        return {key: _in_steps(each, steps) for key, each in value.items()} | timed
    return [_in_steps(each, steps) for each in value] if isinstance(value, list) else value


def cell_of(record: dict[str, Any]) -> Cell:
    """Return the cell that a record of results is about."""
    return Cell(**{each.name: record[each.name] for each in dataclasses.fields(Cell)})
