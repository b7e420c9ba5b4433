"""What each target can express, and that a recipe is refused for what its target can't."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget, TieRule
from trainable_core.errors import UnsupportedConfigError
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.targets.known import TARGETS
from trainable_core.targets.target import Requantization

WEIGHTS, ACTIVATIONS = QuantizationTarget.Weights, QuantizationTarget.Activation
SYMMETRIC, POWER_OF_TWO, UNIFORM = (
    QuantizationMethod.SYMMETRIC,
    QuantizationMethod.POWER_OF_TWO,
    QuantizationMethod.UNIFORM,
)
LUT_POT = QuantizationMethod.LUT_POT_QUANTIZER

LINEAR = (SYMMETRIC, POWER_OF_TWO, UNIFORM)
EXPRESSED: dict[tuple[str, QuantizationTarget], dict[QuantizationMethod, range]] = {
    ("mctq", WEIGHTS): {**dict.fromkeys(LINEAR, range(1, 17)), **dict.fromkeys(LUT_METHODS, range(1, 9))},
    ("mctq", ACTIVATIONS): {**dict.fromkeys(LINEAR, range(1, 17)), LUT_POT: range(1, 9)},
    ("native", WEIGHTS): {**dict.fromkeys(LINEAR, range(1, 17)), **dict.fromkeys(LUT_METHODS, range(1, 9))},
    ("native", ACTIVATIONS): {**dict.fromkeys(LINEAR, range(1, 17)), LUT_POT: range(1, 9)},
    ("onnx", WEIGHTS): dict.fromkeys(LINEAR, range(2, 9)),
    ("onnx", ACTIVATIONS): dict.fromkeys(LINEAR, range(2, 17)),
    ("tflite", WEIGHTS): dict.fromkeys((SYMMETRIC, POWER_OF_TWO), range(2, 9)),
    ("tflite", ACTIVATIONS): dict.fromkeys(LINEAR, range(8, 9)),
    ("qonnx", WEIGHTS): dict.fromkeys(LINEAR, range(2, 17)),
    ("qonnx", ACTIVATIONS): dict.fromkeys(LINEAR, range(2, 17)),
}

CONV = LayerInfo("stem", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)}, bias="bias")
FC = LayerInfo("head", "linear", {"weight": WeightInfo((10, 8), 0)}, bias="bias")


def section(method: str = "SYMMETRIC", n_bits: int = 8, **more: Any) -> dict[str, Any]:
    """Return how one kind of tensor is quantized."""
    return {"method": method, "n_bits": n_bits, "training_method": "LSQ", **more}


def resolve(layers: list[LayerInfo], **fields: Any) -> Any:
    """Return what a recipe of int32 biases makes of layers."""
    return QuantizationRecipe.model_validate({"bias": "int32", **fields}).resolve(layers)


@pytest.mark.parametrize("method", QuantizationMethod, ids=str)
@pytest.mark.parametrize("kind", QuantizationTarget, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_expresses_these_widths_and_refuses_all_others(
    target: str, kind: QuantizationTarget, method: QuantizationMethod
):
    for n_bits in range(1, 17):
        if n_bits in EXPRESSED[target, kind].get(method, ()):
            TARGETS[target].check_grid("layer", kind, method, [n_bits])
        else:
            with pytest.raises(UnsupportedConfigError, match=f"layer: {target}.*{method}.*\n.*use "):
                TARGETS[target].check_grid("layer", kind, method, [n_bits])


def test_every_width_among_which_a_quantizer_chooses_is_checked():
    weights = section(n_bits=4, candidates=[4, 8, 16])
    with pytest.raises(UnsupportedConfigError, match=r"stem.weight: onnx.*16 bits.*\n.*2 to 8 bits"):
        resolve([CONV], weights=weights, target="onnx")
    resolve([CONV], weights={**weights, "candidates": [2, 4, 8]}, target="onnx")


@pytest.mark.parametrize("op", ["conv", "depthwise_conv"])
def test_onnx_has_no_convolution_whose_channels_have_different_zero_points(op: str):
    layer = LayerInfo("stem", op, CONV.weights, bias="bias")
    with pytest.raises(UnsupportedConfigError, match=r"stem.weight: onnx.*UNIFORM.*per channel\n.*per_channel: false"):
        resolve([layer], weights=section("UNIFORM"), target="onnx")
    resolve([layer], weights=section("UNIFORM", per_channel=False), target="onnx")
    resolve([layer], weights=section("SYMMETRIC"), target="onnx")
    resolve([FC], weights=section("UNIFORM"), target="onnx")


def test_tflite_needs_integer_biases_where_weights_are_quantized():
    with pytest.raises(UnsupportedConfigError, match=r"head.bias: tflite.*float bias.*\n.*bias: int32"):
        resolve([FC], weights=section(), target="tflite", bias="float")
    resolve([FC], weights=section(), target="tflite")
    unquantized = [{"match": {"name": "head"}, "weights": {"enabled": False}}]
    resolve([FC], weights=section(), rules=unquantized, target="tflite", bias="float")
    without = LayerInfo("head", "linear", FC.weights)
    resolve([without], weights=section(), target="tflite", bias="float")


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_rule_asks_of_one_layer_is_checked_for_that_layer(target: str):
    rules = [{"match": {"name": "head"}, "weights": {"method": "LUT_SYM_QUANTIZER", "n_bits": 9}}]
    with pytest.raises(UnsupportedConfigError, match=f"^head.weight: {target}"):
        resolve(
            [CONV, FC], weights=section(), rules=rules, target=target, bias="float" if target == "mctq" else "int32"
        )
    resolve([CONV, FC], weights=section(), rules=[*rules, {"match": {"name": "head"}, "skip": True}], target=target)


def test_a_layer_that_is_skipped_needs_nothing_of_a_target():
    plans = resolve(
        [FC], weights=section(n_bits=16), target="tflite", rules=[{"match": {"op": "linear"}, "skip": True}]
    )
    assert [(plan.weights, plan.bias) for plan in plans] == [({}, "float")]


@pytest.mark.parametrize("target", TARGETS)
def test_targets_survive_every_notation(target: str):
    recipe = QuantizationRecipe.model_validate({"target": target, "bias": "int32", "weights": section()})
    assert QuantizationRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert QuantizationRecipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
    assert (recipe.target, recipe.bias) == (target, "int32")


def test_the_records_say_how_each_target_rounds():
    rules = {name: (target.tie_rule, target.requantization) for name, target in TARGETS.items()}
    assert rules == {
        "mctq": (None, None),
        "onnx": (TieRule.HALF_EVEN, Requantization.FLOAT32),
        "tflite": (TieRule.HALF_EVEN, Requantization.FLOAT32),
        "qonnx": (TieRule.HALF_EVEN, None),
        "native": (None, None),
    }


def test_additions_of_tensorflow_lite_round_ties_up_and_everything_else_to_even():
    rules = {op: TARGETS["tflite"].tie_rule_of(op) for op in ("add", "mul", "conv_2d", "mean")}
    assert rules == {**dict.fromkeys(rules, TieRule.HALF_EVEN), "add": TieRule.HALF_UP}
    assert TARGETS["onnx"].tie_rule_of("add") is TieRule.HALF_EVEN
    assert TARGETS["mctq"].tie_rule_of("add") is None
