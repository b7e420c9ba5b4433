"""From figures to sentences: what is set wrong, what is too coarse, and what does not train; the worst first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from trainable_core.diagnosis.quality import GridQuality
from trainable_core.diagnosis.report import Finding, LayerFigures, QuantizerFigures, VariableFigures
from trainable_core.enums import QuantizationTarget

RANGE_DB = 10.0
"""How much better calibrated thresholds have to be for a range to count as set wrong: a tenth of the error."""

NOTABLE = 0.2
"""Share of the total cost that setting something right has to save to come before what needs more bits."""

LARGE = 0.05
"""Share of the total cost from which on a layer is worth a sentence of its own."""

MOSTLY_ALONE = 0.8
"""Share of a layer's cost that it has to cost by itself for that to be told, and not what its float version saves."""

CLIPPED = 0.01
"""Share of values beyond the grid from which on a range counts as too small at one of its ends."""

OSCILLATING = 0.05
"""Share of a weight's elements that may oscillate."""

UNUSED = 0.5
"""Share of codes without values from which on a bit is wasted."""

VALUES_PER_CODE = 16
"""How many values there have to be for each code before codes without any say something."""

WIDTHS = (2, 3, 4, 6, 8, 16)
"""Widths that are suggested, where a grid has them."""


class _Scale:
    """Costs of layers, and how large they are beside the total."""

    def __init__(self, layers: Sequence[LayerFigures], total: float, unit: str) -> None:
        self.costs = {each.layer: each.cost for each in layers}
        self.total, self.unit = total, unit
        self.whole = max([total, *self.costs.values()], default=0.0)

    def of(self, layer: str) -> float:
        """Return the cost of a layer."""
        return max(self.costs.get(layer, 0.0), 0.0)

    def share(self, cost: float) -> float:
        """Return a cost beside the total, or beside the largest of a layer where that is more."""
        if not math.isfinite(self.whole):
            return 0.0 if math.isfinite(cost) else 1.0
        return cost / self.whole if self.whole > 0 else 0.0

    def told(self, layer: LayerFigures) -> str:
        """Return what a layer costs, in words."""
        if layer.alone >= MOSTLY_ALONE * layer.within:
            if layer.alone > self.total:
                return f"`{layer.layer}` alone costs {layer.alone:.3g} {self.unit}, more than all together"
            return f"`{layer.layer}` alone costs {layer.alone:.3g} of {self.total:.3g} {self.unit}"
        rest = f"With `{layer.layer}` in float, the model costs {self.total - layer.within:.3g} instead of "
        return f"{rest}{self.total:.3g} {self.unit}"


def find(
    layers: Sequence[LayerFigures],
    quantizers: Sequence[QuantizerFigures],
    variables: Sequence[VariableFigures],
    total: float,
    unit: str,
) -> tuple[Finding, ...]:
    """Return what is worth doing, the most important first.

    Parameters
    ----------
    layers, quantizers, variables
        The figures.
    total : float
        What quantization costs.
    unit : str
        What costs are counted in.

    Notes
    -----
    The order has four parts. Values that are not finite come first. Then what can be set right without one more bit:
    axes that are wrong, and ranges where that is expected to save at least a fifth of the total. Then layers that cost
    much and need bits or finer thresholds. The rest comes last: ranges that matter less, variables without a gradient,
    oscillations, codes that are never used. Each part is ordered by what is to be gained.
    """
    scale = _Scale(layers, total, unit)
    of_layer: dict[str, list[QuantizerFigures]] = {}
    for each in quantizers:
        of_layer.setdefault(each.layer, []).append(each)
    found = [(0, each) for each in _not_finite(quantizers, scale)]
    axes, ranges = list(_axes(quantizers, scale)), list(_ranges(quantizers, scale))
    first = [*axes, *(each for each in ranges if scale.share(each.cost) >= NOTABLE)]
    found += [(1, each) for each in first] + [(3, each) for each in ranges if each not in first]
    repaired = {each.layer for each in first}  # a layer that is set wrong needs no bits before it is set right
    found += [(2, each) for each in _coarse(layers, of_layer, scale, repaired)]
    misfits = {(each.layer, each.tensor) for each in ranges}  # whose codes are unused because of their range
    fitting = [each for each in quantizers if (each.layer, each.tensor) not in misfits]
    rest = [*_untrained(variables, scale), *_oscillating(quantizers, scale), *_wasted(fitting, scale)]
    found += [(3, each) for each in rest]
    return tuple(each for _, each in sorted(found, key=lambda pair: (pair[0], -pair[1].cost)))


def _not_finite(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        quality = each.quality
        if quality is not None and quality.not_finite:
            seen = f"{quality.not_finite} of {quality.count + quality.not_finite} values of {each.name}"
            ways = "look for the layer before it that diverges, or the bad batch"
            yield _finding(each, "values", scale, f"{seen} are NaN or infinite: {ways}.")


def _ranges(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        quality = each.quality
        if quality is None or quality.calibrated_sqnr is None:
            continue
        gain = quality.calibrated_sqnr - quality.sqnr
        if gain < RANGE_DB or math.isnan(gain):
            continue
        told = _range_told(quality)
        section = "weights" if each.target == str(QuantizationTarget.Weights) else "activations"
        better = f"calibrated thresholds give {gain:.0f} dB more with the same {each.n_bits} bits"
        yield Finding(
            kind="range",
            layer=each.layer,
            tensor=each.tensor,
            cost=scale.of(each.layer) * (1 - 10 ** (-gain / 10)),  # what is left of the error
            sentence=f"The range of {each.name} is set wrong: {told}; {better}. Calibrate it again, "
            f"calibrate(qmodel, batches, force=True), with `calibration: {{{section}: mse}}` in the recipe; if "
            "training led it there, lower the learning rate of thresholds.",
        )


def _range_told(quality: GridQuality) -> str:
    reach = max(abs(quality.minimum), abs(quality.maximum))
    end = max(abs(quality.low), abs(quality.high))
    ends = f"the grid goes from {quality.low:.3g} to {quality.high:.3g}, the values from {quality.minimum:.3g} to "
    ends += f"{quality.maximum:.3g}"
    if end < reach or quality.clipped >= CLIPPED:
        return f"{ends}, and {quality.clipped:.1%} of them are clipped"
    return f"{ends}, {end / reach:.3g} times less" if reach else ends


def _axes(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        if each.output_axis is not None:
            yield _finding(
                each, "axis", scale,
                f"{each.name} has thresholds along axis {each.axis}, and its output channels lie along axis "
                f"{each.output_axis}: name that axis where the layer type is registered or the quantizer is made.",
            )  # fmt: skip


def _coarse(
    layers: Sequence[LayerFigures],
    quantizers: Mapping[str, Sequence[QuantizerFigures]],
    scale: _Scale,
    repaired: set[str],
) -> Iterator[Finding]:
    if not scale.total > 0:  # layers make up for each other's errors, or the metric can't tell them from noise
        return
    usual = {
        target: sorted(widths)[len(widths) // 2]
        for target in map(str, QuantizationTarget)
        if (widths := [each.n_bits for own in quantizers.values() for each in own if each.target == target])
    }
    for layer in layers:
        own = [each for each in quantizers.get(layer.layer, ()) if each.quality is not None]
        if layer.layer in repaired or scale.share(layer.cost) < LARGE or not own or not layer.cost > 0:
            continue
        worst = min(own, key=lambda each: each.quality.sqnr if each.quality else math.inf)
        yield Finding(
            kind="bits",
            layer=layer.layer,
            tensor=worst.tensor,
            cost=layer.cost,
            sentence=f"{scale.told(layer)}: {_advice(worst, usual[worst.target])}.",
        )


def _advice(worst: QuantizerFigures, usual: int) -> str:
    """Return what to do about a quantizer whose error is the largest of its layer; `usual` is the others' width."""
    may = [width for width in worst.widths if worst.n_bits < width <= worst.most_bits]
    wider = next((width for width in (usual, *WIDTHS, *may) if width in may), None)
    weights = worst.target == str(QuantizationTarget.Weights)
    tensor = worst.tensor if worst.tensor.startswith(("input", "output")) else f"input `{worst.tensor}`"
    what = "it" if weights else f"its {tensor}"
    ways = [] if wider is None else [f"give {what} {wider} bits"]
    if worst.chooses:
        ways = [f"give {what} wider candidates than {worst.most_bits} bits"]
        if wider is not None:
            ways = [f"let {what} have {wider} bits, which is one of its candidates"]
    if weights and worst.granularity == "tensor":
        ways.append("give it thresholds per channel")
    elif weights and worst.groups and "group" not in worst.granularity:
        ways.append("give it thresholds per group")
    if not weights:
        ways.append("leave its activations in float")
    return ", or ".join(ways) or f"leave it in float, as its grid has no more than {worst.most_bits} bits"


def _untrained(variables: Sequence[VariableFigures], scale: _Scale) -> Iterator[Finding]:
    for each in variables:
        if each.gradient is None:
            told = (
                "no gradient: nothing that the first output depends on goes through it in training; look for a detach, "
                "no_grad or stop_gradient behind it, or freeze it."
            )
        elif not math.isfinite(each.gradient):
            told = "a gradient that is not finite: look for values that are not finite behind it."
        elif each.gradient == 0:
            told = (
                "a gradient of zero: a bound holds it, no value is beyond it, or no error reaches it; compare it with "
                "the values seen."
            )
        else:
            continue
        layer = each.quantizer.rpartition(": ")[0] or each.quantizer.rpartition(".")[0]
        sentence = f"`{each.name}` of {each.quantizer} gets {told}"
        yield Finding(kind="gradient", layer=layer, tensor=each.name, cost=scale.of(layer), sentence=sentence)


def _oscillating(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        share = max((numbers.get("oscillating", 0.0) for numbers in each.modifiers.values()), default=0.0)
        if share >= OSCILLATING:
            yield _finding(
                each, "oscillation", scale,
                f"{share:.1%} of {each.name} oscillate between two codes: freeze them (oscillation_freezing), or lower "
                "the learning rate towards the end.",
            )  # fmt: skip


def _wasted(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        quality = each.quality
        if quality is None or quality.unused is None or quality.unused < UNUSED or each.n_bits < 2:  # noqa: PLR2004 - one bit is the least
            continue
        if quality.count < VALUES_PER_CODE * 2**each.n_bits:
            continue
        fewer = max(int(-math.log2(max(1 - quality.unused, 2.0**-each.n_bits))), 1)
        least = max(each.n_bits - fewer, 1)
        enough = next((width for width in sorted(each.widths) if least <= width < each.n_bits), None)
        told = (
            f"{quality.unused:.0%} of the codes of {each.name} are never used: a range that fits closer has finer steps"
        )
        if enough is not None:
            told += f", or {'1 bit is' if enough == 1 else f'{enough} bits are'} enough"
        yield _finding(each, "codes", scale, f"{told}.")


def _finding(each: QuantizerFigures, kind: str, scale: _Scale, sentence: str) -> Finding:
    return Finding(kind=kind, layer=each.layer, tensor=each.tensor, cost=scale.of(each.layer), sentence=sentence)
