"""The order of findings, and what their sentences say."""

import json
import math
from dataclasses import replace

from trainable_core.diagnosis.findings import find
from trainable_core.diagnosis.quality import GridQuality
from trainable_core.diagnosis.report import Diagnosis, LayerFigures, QuantizerFigures, VariableFigures

QUALITY = GridQuality(
    sqnr=40.0,
    calibrated_sqnr=41.0,
    clipped=0.0,
    unused=0.1,
    low=-1.0,
    high=1.0,
    minimum=-0.9,
    maximum=0.9,
    count=10_000,
    not_finite=0,
)


def weight(layer, n_bits=8, **more):
    fields = {"granularity": "channel (axis 0)", "quality": QUALITY, "axis": 0, **more}
    return QuantizerFigures(
        layer=layer,
        op="linear",
        tensor="weight",
        target="Weights",
        training_method="LSQ",
        method="SYMMETRIC",
        n_bits=n_bits,
        **fields,
    )


def activation(layer, **more):
    fields = {"granularity": "tensor", "tensor": "input", "target": "Activation", "axis": None, **more}
    return replace(weight(layer), **fields)


def costs(**layers):
    return [LayerFigures(layer=name, op="linear", alone=cost, within=cost / 2) for name, cost in layers.items()]


def found(layers, quantizers, variables=(), total=1.0):
    return find(layers, quantizers, variables, total, "nats")


def test_what_costs_most_comes_first_and_what_costs_little_is_not_told():
    told = found(costs(a=0.3, b=0.6, c=0.01), [weight("a"), weight("b"), weight("c")])
    assert [each.layer for each in told] == ["b", "a"]
    assert [each.kind for each in told] == ["bits", "bits"]
    assert told[0].sentence.startswith("`b` alone costs 0.6 of 1 nats: give it 16 bits")


def test_the_width_of_the_others_is_suggested():
    others = [weight(name) for name in "bcd"]
    (told, *_) = found(costs(a=0.9), [weight("a", 2, groups=True), *others])
    assert told.sentence.endswith("give it 8 bits, or give it thresholds per group.")
    (told, *_) = found(costs(a=0.9), [weight("a", 2, granularity="tensor", axis=None), *others])
    assert told.sentence.endswith("give it 8 bits, or give it thresholds per channel.")


def test_widths_that_a_grid_lacks_are_not_suggested():
    others = [weight(name, 12) for name in "bcd"]
    (told,) = found(costs(a=0.9), [weight("a", 6, most_bits=8), *others])
    assert told.sentence.endswith(": give it 8 bits.")
    (told,) = found(costs(a=0.9), [weight("a", 8, most_bits=8), *others])
    assert told.sentence.endswith(": leave it in float, as its grid has no more than 8 bits.")
    (told,) = found(costs(a=0.9), [activation("a", most_bits=8)])
    assert told.sentence.endswith(": leave its activations in float.")


def test_a_method_that_chooses_its_width_is_shown_its_own_candidates():
    others = [weight(name, 6) for name in "bcd"]
    own = {"widths": (2, 5, 9), "most_bits": 9, "chooses": True}
    (told,) = found(costs(a=0.9), [weight("a", 2, **own), *others])
    assert "let it have 5 bits, which is one of its candidates" in told.sentence
    (told,) = found(costs(a=0.9), [weight("a", 9, **own), *others])
    assert told.sentence.endswith(": give it wider candidates than 9 bits.")


def test_a_width_with_fewer_bits_is_one_that_there_is():
    wasted = replace(QUALITY, unused=0.99, count=100_000)
    for widths, end in (
        ((2, 4, 8), "or 2 bits are enough."),
        ((4, 8), "or 4 bits are enough."),
        ((8,), "finer steps."),
    ):
        (told,) = found(costs(), [weight("a", 8, quality=wasted, widths=widths)])
        assert told.sentence.endswith(end)


def test_the_tensor_with_the_largest_error_is_meant():
    coarse = replace(QUALITY, sqnr=20.0, calibrated_sqnr=20.0)
    (told,) = found(costs(a=0.9), [weight("a"), activation("a", quality=coarse)])
    assert told.tensor == "input"
    assert "give its input 16 bits, or leave its activations in float" in told.sentence


def test_a_layer_whose_float_version_helps_more_is_told_that_way():
    layers = [LayerFigures(layer="a", op="linear", alone=0.1, within=0.4)]
    (told,) = found(layers, [weight("a")])
    assert told.sentence.startswith("With `a` in float, the model costs 0.6 instead of 1 nats")


def test_a_layer_that_costs_more_than_all_together_is_told_that_way():
    (told,) = found(costs(a=0.9), [weight("a")], total=0.5)
    assert told.sentence.startswith("`a` alone costs 0.9 nats, more than all together: give it 16 bits")


def test_a_range_that_is_wrong_comes_before_what_needs_bits():
    tight = replace(QUALITY, sqnr=10.0, low=-0.09, high=0.09, clipped=0.6)
    told = found(costs(a=0.3, b=0.6), [weight("a", quality=tight), weight("b")])
    assert [(each.kind, each.layer) for each in told] == [("range", "a"), ("bits", "b")]
    assert "60.0% of them are clipped" in told[0].sentence
    assert "31 dB more" in told[0].sentence
    assert "with `calibration: {weights: mse}` in the recipe" in told[0].sentence


def test_a_range_that_is_wrong_and_costs_little_comes_last():
    wide = replace(QUALITY, sqnr=10.0, low=-90.0, high=90.0)
    told = found(costs(a=0.1, b=0.6), [weight("a", quality=wide), weight("b")])
    assert [(each.kind, each.layer) for each in told] == [("bits", "b"), ("bits", "a"), ("range", "a")]
    assert "the grid goes from -90 to 90, the values from -0.9 to 0.9, 100 times less" in told[2].sentence


def test_an_axis_that_is_wrong_comes_first_whatever_it_costs():
    told = found(costs(a=0.001, b=0.6), [weight("a", output_axis=1), weight("b")])
    assert [(each.kind, each.layer) for each in told] == [("axis", "a"), ("bits", "b")]
    assert "along axis 0, and its output channels lie along axis 1" in told[0].sentence


def test_values_that_are_not_finite_come_before_everything():
    bad = replace(QUALITY, not_finite=3)
    told = found(costs(a=math.inf, b=0.6), [activation("a", quality=bad), weight("b", output_axis=1)], total=math.inf)
    assert told[0].kind == "values"
    assert "3 of 10003 values" in told[0].sentence


def test_variables_without_a_gradient_oscillations_and_unused_codes():
    variables = [
        VariableFigures(quantizer="a.weight", name="threshold", value=1.0, gradient=None, moved=0.0),
        VariableFigures(quantizer="b: input", name="range_max", value=1.0, gradient=0.0, moved=0.0),
        VariableFigures(quantizer="b.weight", name="threshold", value=1.0, gradient=0.5, moved=0.0),
    ]
    wasteful = replace(QUALITY, unused=0.8)
    quantizers = [
        weight("a", modifiers={"oscillation_dampening": {"oscillating": 0.2}}),
        weight("b", modifiers={"oscillation_dampening": {"oscillating": 0.01}}, quality=wasteful),
    ]
    told = found(costs(a=0.0, b=0.0), quantizers, variables, total=0.0)
    assert sorted((each.kind, each.layer, each.tensor) for each in told) == [
        ("codes", "b", "weight"),
        ("gradient", "a", "threshold"),
        ("gradient", "b", "range_max"),
        ("oscillation", "a", "weight"),
    ]
    codes = next(each for each in told if each.kind == "codes")
    assert "80% of the codes of b.weight are never used" in codes.sentence
    assert "6 bits are enough" in codes.sentence  # a fifth of 256 codes


def test_a_gradient_that_is_not_finite_is_told_as_such():
    for gradient in (math.nan, math.inf):
        variable = VariableFigures(quantizer="a.weight", name="threshold", value=1.0, gradient=gradient, moved=0.0)
        (told,) = found(costs(a=0.0), [weight("a")], [variable], total=0.0)
        assert "gets a gradient that is not finite" in told.sentence


def test_codes_that_a_wrong_range_leaves_unused_are_not_told_again():
    wide = replace(QUALITY, sqnr=10.0, low=-90.0, high=90.0, unused=0.99)
    assert [each.kind for each in found(costs(a=0.0), [weight("a", quality=wide)], total=0.0)] == ["range"]
    (told,) = found(costs(a=0.0), [weight("a", quality=replace(QUALITY, unused=0.996))], total=0.0)
    assert told.sentence.endswith("or 1 bit is enough.")


def test_few_values_say_nothing_of_codes():
    few = replace(QUALITY, unused=0.8, count=100)
    assert found(costs(a=0.0), [weight("a", quality=few)], total=0.0) == ()


def test_nothing_is_told_where_quantization_costs_nothing():
    for each in (costs(a=0.0, b=-0.1), costs(a=0.0, b=0.1)):
        assert found(each, [weight("a"), weight("b")], total=-0.05) == ()


def test_a_report_is_json_and_a_table():
    layers = tuple(costs(a=math.inf, b=0.5))
    quantizers = (weight("a"), activation("a", quality=None), weight("b"))
    diagnosis = Diagnosis(
        metric="kl",
        unit="nats",
        float_cost=0.25,
        total=0.75,
        findings=found(layers, quantizers),
        layers=layers,
        quantizers=quantizers,
        variables=(),
        batches=2,
    )
    document = json.loads(diagnosis.to_json())
    assert document["schema_version"] == 1
    assert document["layers"][0]["alone"] is None  # JSON has no infinity
    assert document["layers"][1]["alone"] == 0.5
    assert document["quantizers"][0]["quality"]["sqnr"] == 40.0
    assert [row["sqnr"] for row in diagnosis.rows if "sqnr" in row] == [40.0, 40.0]
    assert diagnosis.rows[2]["alone"] == 0.5
    text = str(diagnosis).splitlines()
    assert text[0] == "Quantization costs 0.75 nats over 2 batches. (The float model: 0.25.)"
    assert any(line.startswith("b ") and " 40.0 " in line for line in text)
    assert "no value seen" in str(diagnosis)
