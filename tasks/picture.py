"""Draw the README's picture: the weights of a float model become codes of a file.

    python -m tasks.picture

The numbers are computed by `trainable_core`. The picture has a background of its own, so it can be read on light and
dark pages, and it follows the reader's colour scheme.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainable_core.enums import QuantizationMethod
from trainable_core.qparams import QParams, from_params
from trainable_core.reference import affine

PATH = Path(__file__).parents[1] / "docs/images/float-to-integers.svg"
WEIGHTS = np.array([[-0.71, 0.22, 0.38], [0.09, -0.33, 0.85], [0.47, -0.12, 0.60]])
SIGNED = True
GRID = from_params(QuantizationMethod.POWER_OF_TWO, 4, SIGNED, {"threshold": 1.0})

WIDTH, HEIGHT = 900, 322
CELL, TOP = 58, 84
LEFT, RIGHT = 40, 686
AXIS, AXIS_FROM, AXIS_TO = 158, 320, 580

STYLE = """
.card { fill: #f6f8fa; stroke: #d0d7de }
text { font: 14px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-weight: 600; font-size: 16px }
.small { font-size: 12.5px; fill: #59636e }
.code { font: 15px ui-monospace, "DejaVu Sans Mono", monospace }
.float { fill: #ddf4ff; stroke: #54aeff }
.integer { fill: #dafbe1; stroke: #4ac26b }
.line { stroke: #59636e; stroke-width: 1.5; fill: none }
.tick { stroke: #1a7f37; stroke-width: 2 }
.value { fill: #0969da }
.move { stroke: #8c959f; stroke-width: 1; fill: none }
@media (prefers-color-scheme: dark) {
  .card { fill: #151b23; stroke: #3d444d }
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .float { fill: #0c2d6b; stroke: #388bfd }
  .integer { fill: #033a16; stroke: #2ea043 }
  .line { stroke: #9198a1 }
  .tick { stroke: #3fb950 }
  .value { fill: #58a6ff }
  .move { stroke: #656c76 }
}
"""


def picture(weights: np.ndarray, grid: QParams) -> str:
    """Return the SVG.

    Parameters
    ----------
    weights : float array, shape (3, 3)
        A kernel.
    grid : QParams
        Its grid, per tensor.
    """
    codes = affine.quantize(weights, grid)
    label = "The float weights of a model are trained on a grid of 4 bits, and the file holds their codes."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12"/>',
        *_text(LEFT + 1.5 * CELL, 42, "float model", "title"),
        *_text(LEFT + 1.5 * CELL, 64, "weights in float32", "small"),
        *_cells(LEFT, [f"{value:.2f}" for value in weights.flat], "float"),
        *_text((AXIS_FROM + AXIS_TO) / 2, 42, "trained on a grid", "title"),
        *_text((AXIS_FROM + AXIS_TO) / 2, 64, "4 bits: 16 values; the threshold is learned", "small"),
        *_grid(weights, codes, grid),
        *_text(RIGHT + 1.5 * CELL, 42, "integer file", "title"),
        *_text(RIGHT + 1.5 * CELL, 64, f"4-bit codes, scale {float(grid.scale):g}", "small"),
        *_cells(RIGHT, [str(code) for code in codes.flat], "integer"),
        *_arrow(LEFT + 3 * CELL + 12, AXIS_FROM - 22, TOP + 1.5 * CELL, "wrap"),
        *_arrow(AXIS_TO + 22, RIGHT - 12, TOP + 1.5 * CELL, "export"),
        *_text(WIDTH / 2, 292, "verify runs the file and compares every code with the model's", ""),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, kind: str) -> Iterator[str]:
    chosen = f' class="{kind}"' if kind else ""
    yield f'<text{chosen} x="{x:g}" y="{y:g}">{words}</text>'


def _cells(left: float, words: list[str], kind: str) -> Iterator[str]:
    for index, word in enumerate(words):
        x, y = left + index % 3 * CELL, TOP + index // 3 * CELL
        yield f'<rect class="{kind}" x="{x:g}" y="{y}" width="{CELL - 6}" height="{CELL - 6}" rx="5"/>'
        yield from _text(x + CELL / 2 - 3, y + CELL / 2 + 2, word.replace("-", "\N{MINUS SIGN}"), "code")


def _grid(weights: np.ndarray, codes: np.ndarray, grid: QParams) -> Iterator[str]:
    """Draw the grid as a number line, and how each weight moves to its code."""

    def at(value: float) -> float:
        low, high = grid.quant_min, grid.quant_max
        return AXIS_FROM + (value / float(grid.scale) - low) / (high - low) * (AXIS_TO - AXIS_FROM)

    yield f'<path class="line" d="M{AXIS_FROM} {AXIS}H{AXIS_TO}"/>'
    for code in range(grid.quant_min, grid.quant_max + 1):
        x = at(code * float(grid.scale))
        yield f'<path class="tick" d="M{x:.1f} {AXIS - 7}V{AXIS + 7}"/>'
        if code in (grid.quant_min, 0, grid.quant_max):
            yield from _text(x, AXIS + 64, str(code).replace("-", "\N{MINUS SIGN}"), "code")
    for weight, code in zip(weights.flat, codes.flat, strict=True):
        start, end = at(float(weight)), at(float(code) * float(grid.scale))
        yield f'<circle class="value" cx="{start:.1f}" cy="{AXIS - 40}" r="4"/>'
        yield f'<path class="move" d="M{start:.1f} {AXIS - 35}L{end:.1f} {AXIS - 9}"/>'
        yield f'<circle class="tick" fill="none" cx="{end:.1f}" cy="{AXIS + 28}" r="5"/>'
    yield from _text((AXIS_FROM + AXIS_TO) / 2, AXIS + 92, "codes", "small")


def _arrow(start: float, end: float, y: float, words: str) -> Iterator[str]:
    yield f'<path class="line" d="M{start:g} {y:g}H{end:g}m-9 -6l9 6l-9 6"/>'
    yield from _text((start + end) / 2, y - 12, words, "small")


if __name__ == "__main__":
    PATH.write_text(picture(WEIGHTS, GRID), encoding="utf-8")
