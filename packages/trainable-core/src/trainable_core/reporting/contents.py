"""What a report says, before any page is made of it; and how it is gathered from a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.codes import CodeCounter, ends_of, number_of_codes, places_of, sample_of
from trainable_core.backend.description import Description
from trainable_core.backend.view import ModelView
from trainable_core.calibration import Observer
from trainable_core.diagnosis.report import Diagnosis
from trainable_core.qparams import QParams
from trainable_core.tracking.writers import Scalar

LOOKED_AT = 2**18
"""Elements of a tensor, and of an activation in one call, that a report looks at."""

BINS = 1024
"""Bins of a histogram while values come; a figure has fewer."""


FEW = 0.05
"""Share of exact zeros beyond which they are told."""


@dataclass(frozen=True)
class TensorFacts:
    """How a tensor fits its grid.

    Parameters
    ----------
    name : str
        As in the names of quantizers: ``fc.weight``, or ``fc: output``.
    grid : QParams or None
        Its grid; None where there is none, or a file does not tell it.
    values : Observer
        A histogram of what was looked at.
    codes : int64 array or None
        How often each code of the grid is used; None where there are too many to be of interest, or no grid.
    used : int
        How many of the codes are in use.
    clipped : float or None
        Share of the values that lie farther beyond the grid's ends than half a step.
    odd : int
        How many values were NaN or infinite.
    """

    name: str
    grid: QParams | None
    values: Observer
    codes: NDArray[np.int64] | None = None
    used: int = 0
    clipped: float | None = None
    odd: int = 0


@dataclass(frozen=True)
class Islands:
    """What an exported file computes in integers, and what in float.

    Parameters
    ----------
    path, target : str
        The file, and what it is for.
    size : int
        Its bytes.
    operations : mapping of str to int
        How many operations there are, by name.
    floats : sequence of (str, str, str)
        Layer, operation and reason of each that stays float.
    """

    path: str
    target: str
    size: int
    operations: Mapping[str, int] = field(default_factory=dict)
    floats: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Contents:
    """What a report says.

    Parameters
    ----------
    title : str
        What it is about.
    facts : mapping of str to str
        What stands at the top, in order.
    description : Description
        The table of quantizers.
    tensors : sequence of TensorFacts
        How tensors fit their grids, in the model's order.
    training : sequence of Scalar
        What `track` wrote.
    islands : Islands, optional
        Of an exported file.
    diagnosis : Diagnosis, optional
        What `diagnose` said.
    """

    title: str
    facts: Mapping[str, str]
    description: Description
    tensors: Sequence[TensorFacts] = ()
    training: Sequence[Scalar] = ()
    islands: Islands | None = None
    diagnosis: Diagnosis | None = None


SUBJECT = "report"


def overview(description: Description) -> dict[str, str]:
    """Return what a report says at the top of a model's quantizers.

    Examples
    --------
    >>> overview(Description(()))
    {'weights': '0 quantized', 'activations': '0 quantized'}
    """
    found = {}
    for heading, target in (("weights", "Weights"), ("activations", "Activation")):
        rows = [row for row in description.rows if row.target == target and row.state != "switched off"]
        widths = Counter(row.n_bits for row in rows)
        told = ", ".join(f"{count} with {width} bits" for width, count in sorted(widths.items()))
        found[heading] = told or "0 quantized"
    states = Counter(row.state for row in description.rows)
    if states:
        found["state"] = ", ".join(f"{count} {state}" for state, count in states.most_common())
    if description.left_out:
        found["not quantized"] = str(len(description.left_out))
    return found


def gathered(view: ModelView, batches: Iterable[Any] | None) -> list[TensorFacts]:
    """Return how the tensors of a model fit their grids; a tensor that several places share once.

    Parameters
    ----------
    view : ModelView
        The model.
    batches : iterable, optional
        What activations are looked at with; None: they are left out.

    Raises
    ------
    CalibrationError
        When the batches are none, or one.
    """
    if batches is not None:
        view.check_batches(batches, SUBJECT)
    tensors = list({id(tensor.quantizer): tensor for tensor in reversed(view.tensors())}.values())[::-1]
    seen = {id(tensor): _Seen(tensor.grid) for tensor in tensors if not tensor.is_weight}
    if batches is not None:
        shown = {tensor: seen[id(tensor)].update for tensor in tensors if not tensor.is_weight}
        view.look(batches, shown, SUBJECT)
    found = []
    for tensor in tensors:
        if not tensor.is_weight:
            facts = seen[id(tensor)].facts(tensor.name)
        elif (grid := tensor.grid) is None:
            facts = facts_of_values(tensor.name, view.values(tensor), None)
        else:
            weight, quantized = view.values(tensor), view.quantized(tensor)
            sample = sample_of(weight, quantized, grid, tensor.blocks, LOOKED_AT)
            clipped = float(np.mean(sample.clipped)) if tensor.clips and sample.clipped.size else None
            facts = facts_of_values(tensor.name, sample.values, grid, sample.codes, clipped)
        if not facts.values.empty or facts.odd:
            found.append(facts)
    return found


def facts_of_values(
    name: str,
    values: NDArray[Any],
    grid: QParams | None,
    codes: NDArray[np.int32] | None = None,
    clipped: float | None = None,
) -> TensorFacts:
    """Return how some values fit a grid, of which their codes are given."""
    observer, odd = Observer(BINS), 0
    flat = np.asarray(values, np.float32).reshape(-1)
    flat = flat[places_of(flat.size, LOOKED_AT)]
    finite = flat[np.isfinite(flat)]
    odd = flat.size - finite.size
    observer.update(finite)
    if grid is None or codes is None:
        return TensorFacts(name, grid, observer, odd=odd)
    count = grid.quant_max - grid.quant_min + 1
    inside = np.clip(codes.astype(np.int64) - grid.quant_min, 0, count - 1)
    counts = np.bincount(inside, minlength=count)
    return TensorFacts(name, grid, observer, counts, int(np.count_nonzero(counts)), clipped, odd)


class _Seen:
    """What passed through a holder."""

    def __init__(self, grid: QParams | None) -> None:
        self.values, self.odd = Observer(BINS), 0
        self.counter = None if grid is None or grid.channels_axis is not None else CodeCounter(grid)

    def update(self, values: NDArray[Any], _quantized: object = None) -> None:
        """Take in the values of a call; the ends are those of all of them."""
        flat = values.reshape(-1)
        taken = flat[places_of(flat.size, LOOKED_AT)] if flat.size else flat
        finite = taken[np.isfinite(taken)]
        self.odd += taken.size - finite.size
        self.values.update(finite)
        if self.counter is not None:
            self.counter.update(finite)

    def facts(self, name: str) -> TensorFacts:
        """Return what was found."""
        if self.counter is None or not self.counter.count:
            return TensorFacts(name, None if self.counter is None else self.counter.grid, self.values, odd=self.odd)
        counts = self.counter.counts
        clipped = self.counter.clipped / self.counter.count
        used = int(np.count_nonzero(counts))
        return TensorFacts(name, self.counter.grid, self.values, counts, used, clipped, self.odd)


def remarks(facts: TensorFacts) -> list[str]:
    """Return what is said beside the figures of a tensor."""
    said = [f"{facts.values.count:,} values from {facts.values.minimum:.4g} to {facts.values.maximum:.4g}"]
    if facts.values.zeros > FEW * facts.values.count:
        said.append(f"{facts.values.zeros / facts.values.count:.0%} zeros")
    if facts.grid is not None:
        low, high = ends_of(facts.grid)
        mean = " (mean of the channels)" if facts.grid.scale.size > 1 else ""
        said.append(f"grid from {low:.4g} to {high:.4g}{mean}")
    if facts.grid is not None and facts.codes is not None:
        said.append(f"{facts.used} of {number_of_codes(facts.grid)} codes in use")
    if facts.clipped is not None:
        said.append(f"{facts.clipped:.2%} clipped")
    if facts.odd:
        said.append(f"{facts.odd:,} NaN or infinite")
    return said
