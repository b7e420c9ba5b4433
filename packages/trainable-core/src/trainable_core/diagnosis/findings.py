"""From figures to sentences: what is set wrong, what is too coarse, and what does not train; the worst first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from trainable_core.diagnosis.quality import GridQuality
from trainable_core.diagnosis.report import Finding, LayerFigures, QuantizerFigures, VariableFigures
from trainable_core.enums import QuantizationTarget

RANGE_DB = 10.0
"""How much better calibrated thresholds have to be for a range to count as set wrong: a tenth of the error."""

AXIS_DB = 3.0
"""How much more thresholds along another axis have to gain for an axis to count as wrong: half the error."""

NOTABLE = 0.01
"""Share of the total cost from which on something that is set wrong comes before what needs more bits."""

LARGE = 0.05
"""Share of the total cost from which on a layer is worth a sentence of its own."""

OSCILLATING = 0.05
"""Share of a weight's elements that may oscillate."""

UNUSED = 0.5
"""Share of codes without values from which on a bit is wasted."""

VALUES_PER_CODE = 16
"""How many values there have to be for each code before codes without any say something."""

WIDTHS = (2, 3, 4, 6, 8, 16)
"""Widths that are suggested."""


class _Scale:
    """Costs of layers, and how large they are beside the total."""

    def __init__(self, layers: Sequence[LayerFigures], total: float, unit: str) -> None:
        self.costs = {each.layer: each.cost for each in layers}
        self.total, self.unit = total, unit
        self.whole = max([total, *self.costs.values()], default=0.0)

    def of(self, layer: str) -> float:
        """Return the cost of a layer."""
        return max(self.costs.get(layer, 0.0), 0.0)

    def share(self, layer: str) -> float:
        """Return the cost of a layer beside the total, or beside the largest where that is more."""
        cost = self.of(layer)
        if not math.isfinite(self.whole):
            return 0.0 if math.isfinite(cost) else 1.0
        return cost / self.whole if self.whole > 0 else 0.0

    def told(self, layer: LayerFigures) -> str:
        """Return what a layer costs, in words."""
        if layer.alone >= layer.within:
            return f"`{layer.layer}` alone costs {layer.alone:.3g} of {self.total:.3g} {self.unit}"
        rest = f"with `{layer.layer}` in float, the model costs {self.total - layer.within:.3g} instead of "
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
    The order has four parts. Values that are not finite come first. Then what is set wrong in a layer that costs at
    least a hundredth of the total: a range or an axis, which can be set right without one more bit. Then layers that
    cost much and need bits or finer thresholds. The rest comes last: what is set wrong and costs little, variables
    without a gradient, oscillations, codes that are never used. Each part is ordered by the cost of the layer.
    """
    scale = _Scale(layers, total, unit)
    of_layer: dict[str, list[QuantizerFigures]] = {}
    for each in quantizers:
        of_layer.setdefault(each.layer, []).append(each)
    found = [(0, each) for each in _not_finite(quantizers, scale)]
    wrong = [*_ranges(quantizers, scale), *_axes(quantizers, scale)]
    # a layer that is set wrong needs no bits before it is set right
    repaired = {each.layer for each in wrong}
    found += [(1 if scale.share(each.layer) >= NOTABLE else 3, each) for each in wrong]
    found += [(2, each) for each in _coarse(layers, of_layer, scale, repaired)]
    rest = [*_untrained(variables, scale), *_oscillating(quantizers, scale), *_wasted(quantizers, scale)]
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
        better = f"calibrated thresholds give {gain:.0f} dB more with the same {each.n_bits} bits"
        yield _finding(
            each, "range", scale,
            f"The range of {each.name} is set wrong: {told}; {better}. Calibrate it again, "
            "calibrate(qmodel, batches, force=True), with calibration method mse; if training led it there, lower the "
            "learning rate of thresholds.",
        )  # fmt: skip


def _range_told(quality: GridQuality) -> str:
    reach = max(abs(quality.minimum), abs(quality.maximum))
    end = max(abs(quality.low), abs(quality.high))
    ends = f"the grid goes from {quality.low:.3g} to {quality.high:.3g}, the values from {quality.minimum:.3g} to "
    ends += f"{quality.maximum:.3g}"
    if end < reach:
        return f"{ends}, and {quality.clipped:.1%} of them are clipped"
    return f"{ends}, {end / reach:.3g} times less" if reach else ends


def _axes(quantizers: Sequence[QuantizerFigures], scale: _Scale) -> Iterator[Finding]:
    for each in quantizers:
        if each.axis is None or not each.axis_gains:
            continue
        axis = each.axis % len(each.axis_gains)
        best = max(range(len(each.axis_gains)), key=lambda index: each.axis_gains[index])
        gain = each.axis_gains[best] - each.axis_gains[axis]
        if best == axis or gain < AXIS_DB:
            continue
        yield _finding(
            each, "axis", scale,
            f"{each.name} has thresholds along axis {axis}, and its channels differ along axis {best}: thresholds "
            f"there have {gain:.1f} dB less error. If {best} is the axis of the output channels, say so by "
            "register_layer; else rescale the channels, or give it more bits.",
        )  # fmt: skip


def _coarse(
    layers: Sequence[LayerFigures],
    quantizers: Mapping[str, Sequence[QuantizerFigures]],
    scale: _Scale,
    repaired: set[str],
) -> Iterator[Finding]:
    for layer in layers:
        own = [each for each in quantizers.get(layer.layer, ()) if each.quality is not None]
        if layer.layer in repaired or scale.share(layer.layer) < LARGE or not own or not layer.cost > 0:
            continue
        worst = min(own, key=lambda each: each.quality.sqnr if each.quality else math.inf)
        yield Finding(
            kind="bits",
            layer=layer.layer,
            tensor=worst.tensor,
            cost=layer.cost,
            sentence=f"{scale.told(layer)}: {_advice(worst)}.",
        )


def _advice(worst: QuantizerFigures) -> str:
    """Return what to do about a quantizer whose error is the largest of its layer."""
    wider = next((width for width in WIDTHS if width > worst.n_bits), None)
    weights = worst.target == str(QuantizationTarget.Weights)
    what = "it" if weights else f"its {worst.tensor}"
    ways = [] if wider is None else [f"give {what} {wider} bits"]
    if weights and worst.granularity == "tensor":
        ways.append("give it thresholds per channel")
    elif weights and "group" not in worst.granularity:
        ways.append("give it thresholds per group")
    if not weights:
        ways.append("leave its activations in float")
    return ", or ".join(ways)


def _untrained(variables: Sequence[VariableFigures], scale: _Scale) -> Iterator[Finding]:
    for each in variables:
        if each.gradient is not None and each.gradient > 0:
            continue
        got = "no gradient" if each.gradient is None else "a gradient of zero"
        layer = each.quantizer.rpartition(": ")[0] or each.quantizer.rpartition(".")[0]
        sentence = f"`{each.name}` of {each.quantizer} gets {got}: "
        sentence += (
            "nothing that the first output depends on goes through it in training; look for a detach, no_grad or "
            "stop_gradient behind it, or freeze it."
            if each.gradient is None
            else "a bound holds it, or no error reaches it; compare its value with the values seen."
        )
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
        yield _finding(
            each, "codes", scale,
            f"{quality.unused:.0%} of the codes of {each.name} are never used: a range that fits closer has finer "
            f"steps, or {max(each.n_bits - fewer, 1)} bits are enough.",
        )  # fmt: skip


def _finding(each: QuantizerFigures, kind: str, scale: _Scale, sentence: str) -> Finding:
    return Finding(kind=kind, layer=each.layer, tensor=each.tensor, cost=scale.of(each.layer), sentence=sentence)
