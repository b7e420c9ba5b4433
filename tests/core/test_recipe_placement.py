"""Whose rules hold for a quantizer that stands behind the activation after its layer, and when it stays."""

from __future__ import annotations

from typing import Any

import pytest

from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.placement import MOVED, Call, behind_activations

ACTIVATIONS = {"method": "UNIFORM", "n_bits": 8, "training_method": "STE", "placement": "outputs"}
WEIGHTS = {"fc": {"weight": WeightInfo((2, 2), 0)}}


def rule(name: str, n_bits: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a rule for one layer's activations."""
    width = {} if n_bits is None else {"n_bits": n_bits}
    return {"match": {"name": name}, "activations": {**width, **more}}


def widths(calls: list[Call], *rules: dict[str, Any]) -> dict[str, int | None]:
    """Return the width of each layer's output, None where there is no quantizer; names that start with "a" activate."""
    names = dict.fromkeys(name for call in calls for name in call if name is not None)
    layers = [
        LayerInfo(name, "activation" if name.startswith("a") else "linear", WEIGHTS.get(name[:2], {})) for name in names
    ]
    recipe = QuantizationRecipe.of({"activations": ACTIVATIONS, "rules": list(rules)})
    plans = behind_activations(recipe, recipe.resolve(layers), calls)
    assert [plan.layer for plan in plans] == layers
    return {plan.layer.name: plan.activation.config.n_bits if plan.activation else None for plan in plans}


PAIR: list[Call] = [("fc", "act"), ("act", None)]


def test_without_rules_the_quantizer_stands_behind_the_activation():
    assert widths(PAIR) == {"fc": None, "act": 8}


def test_a_rule_for_the_layer_reaches_it_there():
    assert widths(PAIR, rule("fc", 3)) == {"fc": None, "act": 3}


def test_a_rule_for_the_activation_reaches_it():
    assert widths(PAIR, rule("act", 3)) == {"fc": None, "act": 3}


@pytest.mark.parametrize(
    ("rules", "width"), [((rule("fc", 3), rule("act", 5)), 5), ((rule("act", 5), rule("fc", 3)), 3)]
)
def test_of_rules_for_both_the_later_one_wins(rules: tuple[dict[str, Any], ...], width: int):
    assert widths(PAIR, *rules) == {"fc": None, "act": width}


def test_rules_for_both_add_up_field_by_field():
    recipe = QuantizationRecipe.of(
        {"activations": ACTIVATIONS, "rules": [rule("fc", 3), rule("act", method="POWER_OF_TWO")]}
    )
    layers = [LayerInfo("fc", "linear"), LayerInfo("act", "activation")]
    _, plan = behind_activations(recipe, recipe.resolve(layers), PAIR)
    assert plan.activation is not None
    assert (str(plan.activation.config.quantization_method), plan.activation.config.n_bits) == ("POWER_OF_TWO", 3)


def test_a_rule_for_an_op_reaches_it_too():
    linear = {"match": {"op": "linear"}, "activations": {"n_bits": 4}}
    assert widths(PAIR, linear) == {"fc": None, "act": 4}


def test_a_layer_without_weights_says_where_its_quantizer_is():
    recipe = QuantizationRecipe.of({"activations": ACTIVATIONS})
    layers = [LayerInfo("add", "add"), LayerInfo("act", "activation")]
    first, _ = behind_activations(recipe, recipe.resolve(layers), [("add", "act"), ("act", None)])
    assert first.reason == MOVED


@pytest.mark.parametrize("off", [{"enabled": False}, {"placement": "inputs"}])
def test_a_layer_without_a_quantizer_there_says_nothing_about_the_activation(off: dict[str, Any]):
    found = widths(PAIR, rule("fc", 3, **off))
    assert found["act"] == 8


@pytest.mark.parametrize("off", [rule("act", enabled=False), {"match": {"name": "act"}, "skip": True}])
def test_an_activation_that_is_not_quantized_leaves_the_layer_its_quantizer(off: dict[str, Any]):
    assert widths(PAIR, rule("fc", 3), off) == {"fc": 3, "act": None}


def test_a_layer_that_is_not_always_followed_by_an_activation_keeps_its_quantizer():
    assert widths([("fc", "act"), ("fc", None), ("act", None)], rule("fc", 3)) == {"fc": 3, "act": 8}


SHARED: list[Call] = [("fc1", "act"), ("fc2", "act"), ("act", None), ("act", None)]


def test_an_activation_behind_several_layers_serves_all_of_them():
    assert widths(SHARED) == {"fc1": None, "fc2": None, "act": 8}
    assert widths(SHARED, rule("fc?", 3)) == {"fc1": None, "fc2": None, "act": 3}


def test_layers_that_ask_for_different_quantizers_keep_them():
    assert widths(SHARED, rule("fc1", 3)) == {"fc1": 3, "fc2": None, "act": 8}
    assert widths(SHARED, rule("fc1", 3), rule("fc2", 4)) == {"fc1": 3, "fc2": 4, "act": 8}
    assert widths(SHARED, rule("fc1", 3), rule("act", 5)) == {"fc1": None, "fc2": None, "act": 5}


def test_an_activation_that_is_also_called_on_something_else_is_as_its_own_rules_say():
    calls: list[Call] = [("fc", "act"), ("act", None), ("act", None)]
    assert widths(calls) == {"fc": None, "act": 8}
    assert widths(calls, rule("fc", 3)) == {"fc": 3, "act": 8}


def test_a_layer_before_different_activations():
    calls: list[Call] = [("fc", "a1"), ("fc", "a2"), ("a1", None), ("a2", None)]
    assert widths(calls, rule("fc", 3)) == {"fc": None, "a1": 3, "a2": 3}
    # behind a2 its rule does not hold, so it stays; then a1 has its own width as well
    assert widths([*calls, ("a2", None)], rule("fc", 3)) == {"fc": 3, "a1": 8, "a2": 8}


def test_a_rule_goes_through_a_chain_of_activations():
    calls: list[Call] = [("fc", "a1"), ("a1", "a2"), ("a2", None)]
    assert widths(calls, rule("fc", 3)) == {"fc": None, "a1": None, "a2": 3}
    assert widths(calls, rule("fc", 3), rule("a1", 4)) == {"fc": None, "a1": None, "a2": 4}
    assert widths(calls, rule("a2", 5), rule("fc", 3)) == {"fc": None, "a1": None, "a2": 3}


def test_an_activation_that_follows_itself():
    assert widths([("fc", "act"), ("act", "act"), ("act", None)]) == {"fc": None, "act": 8}


def test_calls_of_unknown_layers_do_not_count():
    assert widths([("fc", "act"), ("act", None), ("fc", "act")][:2], rule("fc", 3))["act"] == 3
    recipe = QuantizationRecipe.of({"activations": ACTIVATIONS})
    plans = recipe.resolve([LayerInfo("fc", "linear")])
    assert behind_activations(recipe, plans, [("fc", "gone"), ("gone", None)]) == plans
