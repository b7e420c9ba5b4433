"""Integer biases: the grid of a layer's sums of products, and what recipes say of biases."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from trainable_core.errors import IntegerRangeError, RuleError, UnsupportedConfigError
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, LayerKind, WeightInfo, layer_info
from trainable_core.recipe.placement import behind_activations
from trainable_core.reference.bias import CODE_MAX, CODE_MIN, bias_codes, bias_scale, check_bias, fake_quantize_bias

F32 = np.float32

# ---- the reference --------------------------------------------------------------------------------------------------


def test_the_scale_is_the_product_of_the_two_scales_rounded_once():
    x, w = F32(0.1), np.array([0.1, 0.3, 1e-7], F32)
    scale = bias_scale(x, w)
    assert scale.dtype == F32
    exact = x.astype(np.float64) * w.astype(np.float64)  # 48 bits: exact
    assert scale.tolist() == exact.astype(F32).tolist()


def test_the_channels_of_a_transposed_convolution_are_repeated_for_each_group():
    assert bias_scale(F32(2), np.array([1, 3], F32), groups=2).tolist() == [2, 6, 2, 6]
    assert bias_scale(F32(2), F32(3), groups=2).shape == ()


def test_codes_are_rounded_half_to_even():
    bias = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 0.75, -3.0], F32)
    assert bias_codes(bias, F32(1)).tolist() == [0, 2, 2, 0, -2, 0, 1, -3]
    assert fake_quantize_bias(bias, F32(0.25)).tolist() == bias.tolist()


def test_codes_beyond_int32_saturate_and_are_refused():
    bias = np.array([1.0, 2.0**32, -(2.0**32), 3.0], F32)
    assert fake_quantize_bias(bias, F32(1)).tolist() == [1, CODE_MAX, CODE_MIN, 3]
    with pytest.raises(IntegerRangeError, match=r"fc.bias: its code of channel 1 is beyond int32.*1 more") as caught:
        check_bias("fc.bias", bias, F32(1))
    error = copy.copy(caught.value)
    assert (error.subject, error.channel, error.count, error.scale) == ("fc.bias", 1, 2, 1.0)
    assert isinstance(error, OverflowError)


def test_the_first_and_the_last_code_that_int32_holds_are_taken():
    ends = np.array([-(2.0**31), 2.0**31 - 128], F32)
    check_bias("fc.bias", ends, F32(1))
    assert ends.astype(np.int32).tolist() == [-(2**31), 2**31 - 128]
    with pytest.raises(IntegerRangeError):
        check_bias("fc.bias", np.array([2.0**31], F32), F32(1))
    with pytest.raises(IntegerRangeError):
        check_bias("fc.bias", np.nextafter(ends[:1], F32(-np.inf)), F32(1))


@pytest.mark.parametrize("bias", [np.nan, np.inf, -np.inf, 0.0])
def test_what_has_no_code_is_refused(bias: float):
    scale = F32(0) if bias == 0.0 else F32(1)  # a product of scales may underflow
    with pytest.raises(IntegerRangeError):
        check_bias("fc.bias", np.array([bias], F32), scale)


# ---- recipes --------------------------------------------------------------------------------------------------------


def section(method: str = "SYMMETRIC", n_bits: int = 8, **more: Any) -> dict[str, Any]:
    """Return how one kind of tensor is quantized."""
    return {"method": method, "n_bits": n_bits, "training_method": "LSQ", **more}


CONV = LayerInfo("conv", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)}, bias="bias")
BARE = LayerInfo("bare", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)})
FC = LayerInfo("fc", "linear", {"weight": WeightInfo((10, 8), 0)}, bias="bias")
RELU, GELU = LayerInfo("relu", "activation", clamps=True), LayerInfo("gelu", "activation")
ADD, NORM = LayerInfo("add", "add"), LayerInfo("norm", "normalization")
ALL = [CONV, BARE, FC, RELU, GELU, ADD, NORM]


def plans(layers: list[LayerInfo] = ALL, **fields: Any) -> dict[str, Any]:
    """Return what a recipe makes of layers, by name."""
    recipe = QuantizationRecipe.model_validate({"weights": section(), **fields})
    return {plan.layer.name: plan for plan in recipe.resolve(layers)}


def test_biases_are_float_unless_the_recipe_says_otherwise():
    assert {plan.bias for plan in plans().values()} == {"float"}
    assert not QuantizationRecipe.model_validate({"weights": section()}).quantizes_biases


def test_the_biases_of_layers_with_quantized_weights_become_integers():
    found = plans(bias="int32")
    assert {name for name, plan in found.items() if plan.bias == "int32"} == {"conv", "fc"}


def test_later_rules_win():
    rules: list[dict[str, Any]] = [
        {"match": {"op": "conv"}, "bias": "int32"},
        {"match": {"name": "c*"}, "bias": "float"},
    ]
    assert plans(rules=rules)["conv"].bias == "float"
    assert plans(rules=rules[:1])["conv"].bias == "int32"
    assert plans(rules=rules[:1])["fc"].bias == "float"
    assert plans(rules=rules[::-1])["conv"].bias == "int32"
    assert plans(bias="int32", rules=rules[1:])["fc"].bias == "int32"


def test_a_rule_for_the_bias_of_layers_without_one_is_an_error():
    for match in ({"name": "bare"}, {"op": "add"}, {"op": "activation"}):
        with pytest.raises(RuleError, match="none of its layers has a bias"):
            plans(rules=[{"match": match, "bias": "int32"}])
    plans(rules=[{"match": {"op": "conv"}, "bias": "int32"}])  # one of two has


@pytest.mark.parametrize("rule", [{"skip": True}, {"weights": {"enabled": False}}])
def test_a_layer_that_stays_float_keeps_its_bias(rule: dict[str, Any]):
    assert plans(bias="int32", rules=[{"match": {"name": "fc"}, **rule}])["fc"].bias == "float"


def test_a_bias_that_can_not_be_an_integer_is_refused_with_its_layer():
    tables = [{"match": {"name": "fc"}, "weights": {"method": "LUT_POT_QUANTIZER"}}]
    with pytest.raises(UnsupportedConfigError, match=r"fc.bias: .*a table, without a scale\n.*\"bias\": \"float\""):
        plans(bias="int32", rules=tables)
    plans(bias="int32", rules=[*tables, {"match": {"name": "fc"}, "bias": "float"}])
    inside = LayerInfo("mha", "attention", CONV.weights, bias="in_proj_bias", bias_obstacle="it is added inside")
    with pytest.raises(UnsupportedConfigError, match=r"mha.in_proj_bias: .*it is added inside"):
        plans([inside], bias="int32")
    plans([inside])
    two = LayerInfo("cell", "other", {**CONV.weights, "other": WeightInfo((8, 8), 0)}, bias="bias")
    with pytest.raises(UnsupportedConfigError, match=r"cell.bias: .*several quantized weights"):
        plans([two], bias="int32")


def test_a_layer_has_the_bias_that_its_kind_names_if_it_is_there():
    kind = LayerKind("linear", {"kernel": -1}, bias="bias", bias_obstacle="why")
    shapes = {"kernel": (4, 3), "bias": (3,)}
    assert layer_info("fc", None, kind, shapes.get).bias == "bias"
    assert layer_info("fc", None, kind, shapes.get).bias_obstacle == "why"
    del shapes["bias"]
    info = layer_info("fc", None, kind, shapes.get)
    assert (info.bias, info.bias_obstacle) == ("", "")


# ---- placement ------------------------------------------------------------------------------------------------------

INTEGER = {"activations": section("UNIFORM", placement="integer")}


def test_the_integer_placement_quantizes_outputs_and_the_inputs_of_what_integer_kernels_compute():
    found = plans(**INTEGER)
    assert {plan.placement for plan in found.values()} == {"outputs"}
    assert all(plan.integer and plan.activation is not None for plan in found.values())
    fed = {name for name, plan in found.items() if plan.float_inputs is not None}
    assert fed == {"conv", "bare", "fc", "add"}
    assert found["conv"].float_inputs == found["conv"].activation


@pytest.mark.parametrize("placement", ["inputs", "outputs"])
def test_other_placements_leave_float_inputs_alone(placement: str):
    found = plans(activations=section("UNIFORM", placement=placement))
    assert not any(plan.integer or plan.float_inputs for plan in found.values())


def test_one_layer_can_have_the_integer_placement_by_a_rule():
    recipe = {
        "activations": section("UNIFORM"),
        "rules": [{"match": {"name": "fc"}, "activations": {"placement": "integer"}}],
    }
    found = plans(**recipe)
    assert [name for name, plan in found.items() if plan.integer] == ["fc"]
    assert QuantizationRecipe.model_validate({"weights": section(), **recipe}).quantizes_float_inputs


@pytest.mark.parametrize(("placement", "behind"), [("integer", {"relu"}), ("outputs", {"relu", "gelu"})])
def test_in_integers_a_quantizer_moves_behind_a_clamp_only(placement: str, behind: set[str]):
    recipe = QuantizationRecipe.model_validate(
        {"weights": section(), "activations": section("UNIFORM", placement=placement)}
    )
    calls = [("conv", "relu"), ("relu", None), ("fc", "gelu"), ("gelu", None)]
    found = {plan.layer.name: plan for plan in behind_activations(recipe, recipe.resolve(ALL), calls)}
    moved = {"relu": found["conv"].activation is None, "gelu": found["fc"].activation is None}
    assert {name for name, has_moved in moved.items() if has_moved} == behind
    assert found["relu"].activation is not None
    assert found["gelu"].activation is not None
