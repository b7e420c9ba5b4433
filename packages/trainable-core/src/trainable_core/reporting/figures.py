"""The figures of a report: SVG that takes its colours and its font from the page it stands in.

Matplotlib draws with placeholder colours, and these are replaced by the variables of the page, so that a figure is
legible in light and in dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.backend.codes import ends_of
from trainable_core.export.libraries import library
from trainable_core.reporting.contents import TensorFacts
from trainable_core.tracking.writers import Scalar

EXTRA = "trainable-core[report]"

COLOURS = {"#010101": "var(--ink)", "#020202": "var(--values)", "#030303": "var(--grid)", "#040404": "var(--range)"}
"""Placeholders, and what stands for them in the page."""

INK, VALUES, GRID, RANGE = COLOURS

WIDTH, HEIGHT = 3.6, 1.5
"""Inches of a figure; the page scales it."""

BARS = 96
"""Bars of a histogram, at most."""

TICKS = 33
"""Codes of a grid whose points are drawn one by one, at most."""

SETTINGS = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.major.width": 0.6,
}


class Artist:
    """Draws the figures of one page.

    Raises
    ------
    MissingLibraryError
        When Matplotlib is not installed.
    """

    def __init__(self) -> None:
        self._matplotlib = library("matplotlib", "report", EXTRA)
        self._figure = library("matplotlib.figure", "report", EXTRA).Figure
        self._drawn = 0

    def values(self, facts: TensorFacts) -> str:
        """Return a histogram of a tensor's values with the ends, and if they are few the points, of its grid."""
        counts, edges = rebinned(facts)
        with self._drawing() as (figure, axes):
            axes.stairs(counts, edges, fill=True, color=VALUES, linewidth=0)
            if facts.grid is not None:
                low, high = ends_of(facts.grid)
                axes.axvspan(low, high, color=RANGE, alpha=0.18, linewidth=0, zorder=0)
                axes.vlines([low, high], 0, 1, transform=axes.get_xaxis_transform(), color=GRID, linewidth=1)
                points = points_of(facts)
                axes.plot(points, np.zeros(len(points)), "|", color=GRID, markersize=6, clip_on=False)
            axes.set_ylim(0, top_of(counts))
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=6)
            return self._svg(figure, f"histogram of {facts.name}")

    def codes(self, facts: TensorFacts) -> str:
        """Return how often each code is used."""
        assert facts.codes is not None  # noqa: S101 - the page asks only then
        assert facts.grid is not None  # noqa: S101 - codes come with it
        first = facts.grid.quant_min
        with self._drawing() as (figure, axes):
            edges = np.arange(facts.codes.size + 1) + first - 0.5
            axes.stairs(facts.codes / max(facts.codes.sum(), 1), edges, fill=True, color=VALUES, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=8, integer=True)
            return self._svg(figure, f"codes of {facts.name}")

    def training(self, name: str, scalars: Sequence[Scalar]) -> str:
        """Return the ends of a grid over the steps of a training."""
        with self._drawing(left=0.17) as (figure, axes):
            for quantity in ("low", "high"):
                found = [(each.step, each.value) for each in scalars if each.quantity == quantity]
                axes.plot(*zip(*found, strict=True), color=GRID, linewidth=1.2)
            axes.locator_params(axis="both", nbins=5)
            return self._svg(figure, f"grid of {name} over the training")

    def _drawing(self, left: float = 0.06) -> _Drawing:
        return _Drawing(self._matplotlib, self._figure, left)

    def _svg(self, figure: Any, title: str) -> str:
        self._drawn += 1
        buffer = io.StringIO()
        with self._matplotlib.rc_context({**SETTINGS, "svg.hashsalt": f"figure-{self._drawn}"}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return inlined(buffer.getvalue(), title)


class _Drawing:
    """A figure with one pair of axes, in the page's settings."""

    def __init__(self, matplotlib: Any, figure: Any, left: float) -> None:
        self._left = left
        self._context = matplotlib.rc_context(SETTINGS)
        self._make = figure

    def __enter__(self) -> tuple[Any, Any]:
        self._context.__enter__()
        figure = self._make(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((self._left, 0.17, 0.96 - self._left, 0.78))
        return figure, axes

    def __exit__(self, *problem: object) -> None:
        self._context.__exit__(*problem)


def rebinned(facts: TensorFacts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return counts and edges of at most `BARS` bars; zeros are counted where zero is.

    Examples
    --------
    >>> from trainable_core.calibration import Observer
    >>> observer = Observer(4)
    >>> observer.update([0.0, 0.5, 3.5])
    >>> rebinned(TensorFacts("fc.weight", None, observer))
    (array([2., 0., 0., 1.]), array([0., 1., 2., 3., 4.]))
    """
    counts, edges = facts.values.counts.astype(np.float64), facts.values.edges
    if facts.values.zeros:
        counts[min(int(np.searchsorted(edges, 0.0, side="right")) - 1, counts.size - 1)] += facts.values.zeros
    group = -(-counts.size // BARS)
    starts = np.arange(0, counts.size, group)
    summed = np.add.reduceat(counts, starts)
    return summed, np.append(edges[starts], edges[-1])


def top_of(counts: NDArray[np.float64]) -> float:
    """Return where a histogram ends: a single bar, such as that of zeros, is cut off before it flattens all others.

    Examples
    --------
    >>> top_of(np.array([4.0, 5.0, 3.0])), top_of(np.array([900.0, 5.0, 3.0]))
    (5.25, 15.0)
    """
    highest = np.sort(counts)[::-1]
    second = float(highest[1]) if highest.size > 1 else 0.0
    return min(1.05 * float(highest[0]), 3 * second) if second else max(1.05 * float(highest[0]), 1.0)


def points_of(facts: TensorFacts) -> NDArray[np.float64]:
    """Return the values of a grid's codes where they are few and the same for all channels; else none."""
    grid = facts.grid
    if grid is None or grid.scale.size != 1:
        return np.zeros(0)
    codes = np.asarray(grid.levels or np.arange(grid.quant_min, grid.quant_max + 1), np.float64)
    if codes.size > TICKS:
        return np.zeros(0)
    return np.asarray((codes - grid.zero_point.reshape(())) * grid.scale.astype(np.float64).reshape(()))


def _rounded(path: re.Match[str]) -> str:
    """Return a path with a tenth of a point, which is enough."""
    return re.sub(r"(\d\.\d)\d+", r"\1", path[0])


def inlined(svg: str, title: str) -> str:
    """Return a figure as it stands in a page: no prolog, no ids of other figures, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"', _rounded, svg)
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis|LineCollection|PolyCollection)_\d+"',
        "",
        svg,
    )
    svg = re.sub(r"font(-family)?: ([\d.]+px) [^;\"]*", r"font-size: \2", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, variable)
    name = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
