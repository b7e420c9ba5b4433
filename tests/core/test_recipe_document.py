"""What a recipe means: the same in YAML, JSON and Python, and rule by rule."""

from __future__ import annotations

import fnmatch
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.core.json_schema import JsonSchema
from trainable_core import cli
from trainable_core.constants import MIN_THRESHOLD, SIGNED
from trainable_core.enums import CalibrationMethod, QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.errors import DocumentError, RuleError, UnsupportedConfigError
from trainable_core.recipe.document import SKIPPED, QuantizationRecipe
from trainable_core.recipe.layers import OPS, LayerInfo, WeightInfo
from trainable_core.recipe.plan import LayerPlan

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))

WEIGHTS = {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}
ACTIVATIONS = {"method": "SYMMETRIC", "n_bits": 8, "training_method": "STE"}
BOTH = {"weights": WEIGHTS, "activations": ACTIVATIONS}

# The design's example, word for word.
DESIGN = """
schema_version: 1
weights:     {method: SYMMETRIC, n_bits: 4, per_channel: true, training_method: LSQ}
activations: {method: UNIFORM,   n_bits: 8, training_method: LSQ}
calibration: {weights: mse, activations: percentile}
target: mctq                      # checked when wrapping, before training
rules:                            # in order, later wins; a rule that matches nothing is an error
  - {match: {name: "stem.*"},  weights: {n_bits: 8}}
  - {match: {op: linear},      activations: {n_bits: 8}}
  - {match: {name: "head"},    skip: true}
"""

CONV = {"weight": WeightInfo((8, 3, 3, 3), 0)}
LINEAR = {"weight": WeightInfo((10, 8), 0)}
LAYERS = [
    LayerInfo("stem.conv", "conv", CONV),
    LayerInfo("stem.act", "activation"),
    LayerInfo("body.conv", "conv", CONV),
    LayerInfo("body.fc", "linear", LINEAR),
    LayerInfo("add", "add"),
    LayerInfo("head", "linear", LINEAR),
]


def recipe(**fields: Any) -> QuantizationRecipe:
    """Return a recipe of these fields."""
    return QuantizationRecipe.model_validate(fields)


def resolved(layers: list[LayerInfo] = LAYERS, **fields: Any) -> dict[str, LayerPlan]:
    """Return what a recipe makes of layers, by name."""
    return {plan.layer.name: plan for plan in recipe(**fields).resolve(layers)}


def weight_bits(plans: dict[str, LayerPlan]) -> dict[str, int]:
    """Return the width of each quantized weight, by layer."""
    return {name: plan.weights["weight"].config.n_bits for name, plan in plans.items() if plan.weights}


def activation_bits(plans: dict[str, LayerPlan]) -> dict[str, int]:
    """Return the width of each quantized activation, by layer."""
    return {name: plan.activation.config.n_bits for name, plan in plans.items() if plan.activation}


def rule(name: str | None = None, op: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a rule."""
    return {"match": {key: value for key, value in (("name", name), ("op", op)) if value is not None}, **changes}


# ---- one document, three spellings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ""])
@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_a_file_says_the_same_as_a_mapping(suffix: str, tmp_path: Path, *, as_text: bool):
    document = yaml.safe_load(DESIGN)
    path = tmp_path / f"recipe{suffix}"
    path.write_text(json.dumps(document) if suffix == ".json" else DESIGN, encoding="utf-8")
    read = QuantizationRecipe.of(str(path) if as_text else path)
    assert read == QuantizationRecipe.of(document) == QuantizationRecipe.model_validate_json(json.dumps(document))


def test_a_recipe_is_taken_as_it_is():
    given = recipe(**BOTH)
    assert QuantizationRecipe.of(given) is given


def test_a_mapping_is_not_changed():
    document = yaml.safe_load(DESIGN)
    before = json.dumps(document)
    QuantizationRecipe.of(document).resolve(LAYERS)
    assert json.dumps(document) == before


def test_a_recipe_comes_back_from_what_it_writes(tmp_path: Path):
    given = QuantizationRecipe.of(yaml.safe_load(DESIGN))
    for text in (given.model_dump_json(), given.model_dump_json(exclude_unset=True)):
        path = tmp_path / "recipe.json"
        path.write_text(text, encoding="utf-8")
        assert QuantizationRecipe.of(path) == given
        assert QuantizationRecipe.of(path).resolve(LAYERS) == given.resolve(LAYERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_recipes_quantize_every_layer_on_both_sides(path: Path):
    plans = QuantizationRecipe.of(path).resolve(LAYERS)
    with_weights = [plan for plan in plans if plan.layer.weights]
    assert with_weights
    assert all(plan.weights.keys() == plan.layer.weights.keys() and plan.activation for plan in with_weights)


def test_there_are_example_recipes():
    assert EXAMPLES


def test_without_pyyaml_json_still_reads_and_yaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "recipe.json").write_text(json.dumps(BOTH), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(json.dumps(BOTH), encoding="utf-8")
    assert QuantizationRecipe.of(tmp_path / "recipe.json") == recipe(**BOTH)
    with pytest.raises(DocumentError, match=r"trainable-core\[yaml\]"):
        QuantizationRecipe.of(tmp_path / "recipe.yaml")


def test_the_designs_example_does_what_it_says():
    plans = resolved(**yaml.safe_load(DESIGN))
    assert weight_bits(plans) == {"stem.conv": 8, "body.conv": 4, "body.fc": 4}
    assert activation_bits(plans) == {"stem.conv": 8, "body.conv": 8, "body.fc": 8}
    assert plans["head"].reason == "skipped by a rule"
    weights, activation = plans["body.conv"].weights["weight"], plans["body.conv"].activation
    assert activation is not None
    assert (weights.config.quantization_method, weights.config.channels_axis) == (QuantizationMethod.SYMMETRIC, 0)
    assert activation.config.quantization_method is QuantizationMethod.UNIFORM
    assert (weights.training_method, activation.training_method) == ("LSQ", "LSQ")


# ---- what is said once for all --------------------------------------------------------------------------------------


def test_what_may_be_left_out():
    least = recipe()
    assert (least.weights, least.activations, least.rules, least.target) == (None, None, [], "mctq")
    assert least.fold_batch_norm
    assert least.calibration.weights is CalibrationMethod.MSE
    assert least.calibration.activations is CalibrationMethod.PERCENTILE
    assert (least.calibration.percentile, least.calibration.p) == (99.99, 2.0)
    weights = recipe(**BOTH).weights
    assert weights is not None
    assert (weights.per_channel, weights.enabled, weights.min_threshold) == (True, True, MIN_THRESHOLD)
    assert (weights.candidates, weights.arguments) == (None, {})
    activations = recipe(**BOTH).activations
    assert activations is not None
    assert (activations.signed, activations.placement) == (None, "inputs")


def test_an_empty_recipe_quantizes_nothing_and_says_so():
    plans = resolved()
    assert weight_bits(plans) == activation_bits(plans) == {}
    assert {name for name, plan in plans.items() if plan.reason} == {"stem.conv", "body.conv", "body.fc", "head"}


def test_weights_alone():
    plans = resolved(weights=WEIGHTS)
    assert set(weight_bits(plans)) == {"stem.conv", "body.conv", "body.fc", "head"}
    assert activation_bits(plans) == {}


def test_activations_alone_stand_at_the_inputs_of_layers_with_weights():
    plans = resolved(activations=ACTIVATIONS)
    assert weight_bits(plans) == {}
    assert set(activation_bits(plans)) == {"stem.conv", "body.conv", "body.fc", "head"}
    assert {plan.placement for plan in plans.values()} == {"inputs"}


def test_outputs_are_those_of_all_layers():
    plans = resolved(activations={**ACTIVATIONS, "placement": "outputs"})
    assert set(activation_bits(plans)) == {layer.name for layer in LAYERS}
    assert {plan.placement for plan in plans.values()} == {"outputs"}


def test_plans_come_in_the_order_of_the_layers():
    backwards = LAYERS[::-1]
    assert [plan.layer for plan in recipe(**BOTH).resolve(backwards)] == backwards


def test_every_weight_of_a_layer_is_quantized_along_its_own_axis():
    info = {"in_proj_weight": WeightInfo((12, 4), 0), "out_proj.weight": WeightInfo((4, 4), 1)}
    plan = resolved([LayerInfo("attention", "attention", info)], **BOTH)["attention"]
    assert {name: each.config.channels_axis for name, each in plan.weights.items()} == {
        "in_proj_weight": 0,
        "out_proj.weight": 1,
    }


def test_per_tensor_weights_have_no_axis():
    plans = resolved(weights={**WEIGHTS, "per_channel": False})
    assert plans["head"].weights["weight"].config.channels_axis is None


@pytest.mark.parametrize("part", ["weights", "activations"])
def test_what_is_switched_off_is_left_alone(part: str):
    plans = resolved(**{**BOTH, part: {**BOTH[part], "enabled": False}})
    bits = {"weights": weight_bits(plans), "activations": activation_bits(plans)}
    assert bits.pop(part) == {}
    assert len(bits.popitem()[1]) == 4


def test_indices_are_not_quantized():
    layers = [LayerInfo("emb", "embedding", {"weight": WeightInfo((100, 8), 0)})]
    assert activation_bits(resolved(layers, **BOTH)) == {}
    assert weight_bits(resolved(layers, **BOTH)) == {"emb": 4}
    assert resolved(layers, activations=ACTIVATIONS)["emb"].reason == "its inputs are indices"


def test_what_an_embedding_gives_is_quantized():
    layers = [LayerInfo("emb", "embedding", {"weight": WeightInfo((100, 8), 0)})]
    assert activation_bits(resolved(layers, activations={**ACTIVATIONS, "placement": "outputs"})) == {"emb": 8}


@pytest.mark.parametrize(("signed", "params"), [(None, {}), (True, {SIGNED: True}), (False, {SIGNED: False})])
def test_a_sign_reaches_the_config(params: dict[str, bool], *, signed: bool | None):
    plan = resolved(activations={**ACTIVATIONS, "signed": signed})["head"].activation
    assert plan is not None
    assert plan.config.quantization_params == params


def test_candidates_reach_the_configs():
    spec = {"candidates": [2, 4, 8], "training_method": "DQA"}
    plan = resolved(weights={**WEIGHTS, **spec}, activations={**ACTIVATIONS, **spec})["head"]
    assert plan.activation is not None
    for each in (plan.weights["weight"], plan.activation):
        assert [c.n_bits for c in each.config.candidates or []] == [2, 4, 8]


def test_arguments_and_lower_bound_reach_the_plan():
    spec = {"arguments": {"bit_cost_weight": 0.5}, "min_threshold": 0.25}
    plan = resolved(weights={**WEIGHTS, **spec}, activations={**ACTIVATIONS, **spec})["head"]
    assert plan.activation is not None
    for each in (plan.weights["weight"], plan.activation):
        assert (dict(each.arguments), each.config.min_threshold) == ({"bit_cost_weight": 0.5}, 0.25)


def test_plans_start_without_numbers():
    plan = resolved(**BOTH)["head"]
    assert plan.activation is not None
    assert not plan.weights["weight"].config.calibrated
    assert not plan.activation.config.calibrated


class Foreign(Enum):
    """Looks like somebody else's enums, whose values don't matter."""

    SYMMETRIC = "sym"
    LSQ = ("LSQ",)


def test_enum_members_are_taken_by_name():
    spec = {"method": Foreign.SYMMETRIC, "n_bits": np.int64(4), "training_method": Foreign.LSQ}
    own = {"method": QuantizationMethod.SYMMETRIC, "n_bits": 4, "training_method": TrainingMethod.LSQ}
    assert recipe(weights=spec) == recipe(weights=own) == recipe(weights=WEIGHTS)


def test_a_plugins_training_method_is_any_word():
    assert resolved(weights={**WEIGHTS, "training_method": "EWGS"})["head"].weights["weight"].training_method == "EWGS"


# ---- rules ----------------------------------------------------------------------------------------------------------


def test_later_rules_win():
    rules = [rule("*conv", weights={"n_bits": 8}), rule("body.*", weights={"n_bits": 2})]
    assert weight_bits(resolved(**BOTH, rules=rules)) == {"stem.conv": 8, "body.conv": 2, "body.fc": 2, "head": 4}
    assert weight_bits(resolved(**BOTH, rules=rules[::-1]))["body.conv"] == 8


def test_a_rule_changes_single_fields():
    rules = [rule("head", weights={"n_bits": 8}), rule("head", weights={"method": "UNIFORM"})]
    config = resolved(**BOTH, rules=rules)["head"].weights["weight"].config
    assert (config.n_bits, config.quantization_method) == (8, QuantizationMethod.UNIFORM)
    assert resolved(**BOTH, rules=rules)["head"].weights["weight"].training_method == "LSQ"


def test_a_rule_can_give_a_field_its_default_back():
    plans = resolved(weights={**WEIGHTS, "per_channel": False}, rules=[rule("head", weights={"per_channel": True})])
    assert [plans[name].weights["weight"].config.channels_axis for name in ("head", "body.fc")] == [0, None]


def test_names_are_matched_whole_with_shell_patterns():
    layers = [LayerInfo(name, "linear", LINEAR) for name in ("a.fc", "a.fc1", "b.fc", "A.fc", "fc")]
    for pattern, meant in {
        "fc": ["fc"],
        "*.fc": ["a.fc", "b.fc", "A.fc"],
        "a.*": ["a.fc", "a.fc1"],
        "a.fc?": ["a.fc1"],
        "[ab].fc": ["a.fc", "b.fc"],
    }.items():
        plans = resolved(layers, weights=WEIGHTS, rules=[rule(pattern, weights={"n_bits": 8})])
        assert [name for name, width in weight_bits(plans).items() if width == 8] == meant


def test_a_star_also_matches_dots():
    layers = [LayerInfo("stem.block.0.conv", "conv", CONV)]
    assert weight_bits(resolved(layers, **BOTH, rules=[rule("stem.*", weights={"n_bits": 8})])) == {layers[0].name: 8}


def test_name_and_op_must_both_hold():
    assert weight_bits(resolved(**BOTH, rules=[rule("body.*", "linear", weights={"n_bits": 8})])) == {
        "stem.conv": 4,
        "body.conv": 4,
        "body.fc": 8,
        "head": 4,
    }


@pytest.mark.parametrize("op", OPS)
def test_every_op_kind_can_be_named(op: str):
    layers = [LayerInfo("one", op, LINEAR), LayerInfo("other", "conv" if op != "conv" else "linear", LINEAR)]
    assert resolved(layers, **BOTH, rules=[rule(op=op, skip=True)])["one"].reason == "skipped by a rule"
    assert resolved(layers, **BOTH, rules=[rule(op=op, skip=True)])["other"].weights


def test_skip_leaves_a_layer_alone():
    plan = resolved(**BOTH, rules=[rule("head", skip=True)])["head"]
    assert (dict(plan.weights), plan.activation, plan.reason) == ({}, None, "skipped by a rule")


def test_a_later_rule_takes_skip_back():
    rules = [rule(op="linear", skip=True), rule("head", skip=False)]
    assert set(weight_bits(resolved(**BOTH, rules=rules))) == {"stem.conv", "body.conv", "head"}


def test_a_rule_that_says_nothing_of_skip_takes_nothing_back():
    rules = [rule("head", skip=True), rule("head", weights={"n_bits": 8})]
    assert resolved(**BOTH, rules=rules)["head"].reason == "skipped by a rule"


def test_rules_alone_can_quantize():
    plans = resolved(rules=[rule("head", weights=WEIGHTS, activations=ACTIVATIONS)])
    assert (weight_bits(plans), activation_bits(plans)) == ({"head": 4}, {"head": 8})


def test_rules_may_add_up_to_a_whole_spec():
    rules = [
        rule("*", weights={"method": "SYMMETRIC"}),
        rule("*conv", weights={"n_bits": 4, "training_method": "STE"}),
        rule("body.fc", weights={"n_bits": 2, "training_method": "STE"}),
        rule("head", weights={"n_bits": 8, "training_method": "STE"}),
    ]
    assert weight_bits(resolved(rules=rules)) == {"stem.conv": 4, "body.conv": 4, "body.fc": 2, "head": 8}


def test_rules_that_do_not_add_up_name_layer_and_fields():
    with pytest.raises(UnsupportedConfigError, match=r"head: weights.*method, training_method"):
        resolved(rules=[rule("head", weights={"n_bits": 8})])


def test_a_rule_that_matches_nothing_names_itself_and_the_layers():
    with pytest.raises(RuleError, match=r"rules\.1 .*\"haed\".*matches no layer") as caught:
        resolved(**BOTH, rules=[rule("head", skip=True), rule("haed", skip=True)])
    assert caught.value.layers == [layer.name for layer in LAYERS]


def test_a_rule_that_matches_nothing_may_mean_what_could_not_be_seen():
    given = recipe(**BOTH, rules=[rule(op="matmul", activations={"n_bits": 4})])
    with pytest.raises(RuleError, match="branches on its input"):
        given.resolve(LAYERS, unseen="the model branches on its input")


STUCK = [
    *LAYERS,
    LayerInfo("stem", "other", obstacle="it only holds other layers"),
    LayerInfo("rnn", "recurrent", obstacle="it keeps flat copies"),
    LayerInfo("flat", "other", obstacle="Flatten is of no known kind"),
]


@pytest.mark.parametrize("match", [{"op": "recurrent"}, {"name": "rnn"}, {"name": "flat"}, {"name": "r*"}])
def test_layers_that_can_not_be_quantized_can_be_skipped(match: dict[str, str]):
    plans = recipe(**BOTH, rules=[{"match": match, "skip": True}]).resolve(STUCK)
    reasons = {plan.layer.name: plan.reason for plan in plans if plan.layer.obstacle}
    (skipped,) = [name for name, reason in reasons.items() if reason == SKIPPED]
    assert skipped in {"rnn", "flat"}
    assert all(plan.weights for plan in plans if plan.layer.weights)
    assert all(not plan.weights and plan.activation is None for plan in plans if plan.layer.obstacle)


@pytest.mark.parametrize("asked", [{"weights": {"n_bits": 8}}, {"activations": {"n_bits": 8}}])
def test_a_rule_that_asks_only_what_can_not_be_quantized_is_refused_with_the_reason(asked: dict[str, Any]):
    with pytest.raises(RuleError, match="rnn: it keeps flat copies") as caught:
        recipe(**BOTH, rules=[{"match": {"op": "recurrent"}, **asked}]).resolve(STUCK)
    assert caught.value.layers == [layer.name for layer in LAYERS]


def test_a_group_may_hold_layers_that_can_not_be_quantized():
    plans = recipe(**BOTH, rules=[rule("*", weights={"n_bits": 2})]).resolve(STUCK)
    assert set(weight_bits({plan.layer.name: plan for plan in plans}).values()) == {2}


def test_the_name_of_a_module_means_the_layers_inside_of_it():
    plans = {p.layer.name: p for p in recipe(**BOTH, rules=[rule("stem", skip=True)]).resolve(STUCK)}
    assert {name for name, plan in plans.items() if plan.reason == SKIPPED} == {"stem", "stem.conv", "stem.act"}
    plans = {p.layer.name: p for p in recipe(**BOTH, rules=[rule("stem", weights={"n_bits": 2})]).resolve(STUCK)}
    assert weight_bits(plans) == {"stem.conv": 2, "body.conv": 4, "body.fc": 4, "head": 4}


def test_op_and_name_of_a_module_must_both_hold():
    only = {"match": {"name": "stem", "op": "activation"}, "activations": {"n_bits": 2}}
    plans = {p.layer.name: p for p in recipe(**BOTH, rules=[only]).resolve(STUCK)}
    assert activation_bits(plans)["stem.conv"] == 8


def test_the_name_of_a_layer_means_no_other_whose_name_goes_on_with_a_dot():
    layers = [LayerInfo("conv", "conv", CONV), LayerInfo("conv.1", "conv", CONV)]  # Keras allows such names
    plans = recipe(**BOTH, rules=[rule("conv", skip=True)]).resolve(layers)
    assert [plan.reason for plan in plans] == [SKIPPED, ""]


def test_a_pattern_that_means_only_modules_around_layers_is_refused_and_told_how_to_name_them():
    with pytest.raises(RuleError, match=r"\(stem\).*name one of them in full.*'stem\.\*'"):
        recipe(**BOTH, rules=[rule("ste?", skip=True)]).resolve(STUCK)


def test_a_part_of_a_layer_is_told_apart_from_a_name_that_is_nowhere():
    with pytest.raises(RuleError, match="'head' is quantized as a whole"):
        resolved(**BOTH, rules=[rule("head.out_proj", skip=True)])


def test_weights_asked_of_layers_without_name_these_layers():
    with pytest.raises(RuleError, match=r"rules\.0 .*weights") as caught:
        resolved(**BOTH, rules=[rule(op="add", weights={"n_bits": 8})])
    assert caught.value.layers == ["add"]


def test_weights_may_be_asked_of_a_group_that_has_some():
    assert weight_bits(resolved(**BOTH, rules=[rule("stem.*", weights={"n_bits": 8})]))["stem.conv"] == 8


@pytest.mark.parametrize("match", [{"op": "add"}, {"name": "add"}], ids=["op", "full name"])
def test_an_operation_without_weights_is_quantized_when_it_is_named(match: dict[str, str]):
    plans = resolved(**BOTH, rules=[{"match": match, "activations": {"n_bits": 4}}])
    assert activation_bits(plans)["add"] == 4
    assert "stem.act" not in activation_bits(plans)


def test_a_pattern_names_no_operation():
    plans = resolved(**BOTH, rules=[rule("stem.*", activations={"n_bits": 4})])
    assert "stem.act" not in activation_bits(plans)
    assert activation_bits(plans)["stem.conv"] == 4


def test_a_rule_moves_the_quantizer_of_some_layers():
    plans = resolved(**BOTH, rules=[rule("head", activations={"placement": "outputs"})])
    assert (plans["head"].placement, plans["body.fc"].placement) == ("outputs", "inputs")


def test_a_rule_switches_one_side_off():
    plans = resolved(**BOTH, rules=[rule("head", activations={"enabled": False})])
    assert "head" not in activation_bits(plans)
    assert weight_bits(plans)["head"] == 4


def test_a_sign_that_fits_no_range_is_refused_when_rules_bring_them_together():
    spec = {**ACTIVATIONS, "method": "UNIFORM"}
    with pytest.raises(ValidationError, match="signed"):
        resolved(activations=spec, rules=[rule("head", activations={"signed": True})])


def test_numpy_and_enum_members_in_rules_are_written_and_read_back():
    given = recipe(
        **BOTH,
        rules=[
            rule("head", weights={"n_bits": np.int64(2), "method": Foreign.SYMMETRIC, "training_method": Foreign.LSQ})
        ],
    )
    assert QuantizationRecipe.model_validate_json(given.model_dump_json()) == given
    assert given.rules[0].weights == {"n_bits": 2, "method": "SYMMETRIC", "training_method": "LSQ"}


def test_numpy_in_arguments_is_written_and_read_back():
    arguments = {
        "temperature": {"t_start": np.int64(0), "values": np.array([0.5, 1.0])},
        "bit_cost_weight": np.float32(0.5),
    }
    given = recipe(weights={**WEIGHTS, "arguments": arguments})
    assert QuantizationRecipe.model_validate_json(given.model_dump_json()) == given
    assert given.weights is not None
    assert given.weights.arguments == {"temperature": {"t_start": 0, "values": [0.5, 1.0]}, "bit_cost_weight": 0.5}


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a rule that matches some of `LAYERS` and may be asked of them."""
    match = draw(
        st.sampled_from(
            [{"name": "*"}, {"name": "body.*"}, {"op": "conv"}, {"op": "linear"}, {"name": "*c*", "op": "linear"}]
            + [{"name": layer.name} for layer in LAYERS if layer.weights]
        )
    )
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["weights"] = draw(
            st.fixed_dictionaries({"n_bits": st.integers(1, 16)}, optional={"per_channel": st.booleans()})
        )
    if draw(st.booleans()):
        changes["activations"] = {"n_bits": draw(st.integers(1, 16))}
    if not changes or draw(st.booleans()):
        changes["skip"] = draw(st.booleans())
    return {"match": match, **changes}


def matches(match: dict[str, str], layer: LayerInfo) -> bool:
    return fnmatch.fnmatchcase(layer.name, match.get("name", "*")) and match.get("op", layer.op) == layer.op


@given(drawn=st.lists(rules(), max_size=6))
def test_each_field_is_what_the_last_rule_that_says_it_says(drawn: list[dict[str, Any]]):
    plans = resolved(**BOTH, rules=drawn)
    for layer in LAYERS:
        said = [each for each in drawn if matches(each["match"], layer)]
        skip = [each["skip"] for each in said if "skip" in each]
        plan = plans[layer.name]
        if (skip and skip[-1]) or not layer.weights:
            assert (dict(plan.weights), plan.activation) == ({}, None)
            continue
        weights, activations = (
            {key: value for each in said for key, value in each.get(part, {}).items()}
            for part in ("weights", "activations")
        )
        config = plan.weights["weight"].config
        assert config.n_bits == weights.get("n_bits", 4)
        assert config.channels_axis == (0 if weights.get("per_channel", True) else None)
        assert plan.activation is not None
        assert plan.activation.config.n_bits == activations.get("n_bits", 8)


@given(drawn=st.lists(rules(), max_size=6))
def test_json_changes_no_plan(drawn: list[dict[str, Any]]):
    given = recipe(**BOTH, rules=drawn)
    text = given.model_dump_json(exclude_unset=True)
    assert JsonSchema(QuantizationRecipe.model_json_schema()).accepts(json.loads(text))
    back = QuantizationRecipe.model_validate_json(text)
    assert back == given
    assert back.resolve(LAYERS) == given.resolve(LAYERS)


# ---- what the backend asks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({}, False),
        (BOTH, False),
        ({"activations": {**ACTIVATIONS, "placement": "outputs"}}, True),
        ({**BOTH, "rules": [rule("head", activations={"placement": "outputs"})]}, True),
        ({**BOTH, "rules": [rule("head", activations={"n_bits": 4})]}, False),
    ],
)
def test_a_recipe_tells_whether_outputs_matter(fields: dict[str, Any], *, outputs: bool):
    assert recipe(**fields).quantizes_outputs is outputs


def test_a_recipe_tells_whether_a_rule_may_mean_an_operation():
    layers = [layer for layer in LAYERS if layer.op != "add"]
    assert recipe(rules=[rule(op="add", activations=ACTIVATIONS)]).matches_functional(layers)
    assert not recipe(rules=[rule(op="conv", activations=ACTIVATIONS)]).matches_functional(layers)


# ---- target ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "method", "n_bits", "expressed"),
    [
        (QuantizationTarget.Weights, "LUT_SYM_QUANTIZER", 8, True),
        (QuantizationTarget.Weights, "LUT_SYM_QUANTIZER", 9, False),
        (QuantizationTarget.Weights, "LUT_POT_QUANTIZER", 8, True),
        (QuantizationTarget.Weights, "LUT_POT_QUANTIZER", 9, False),
        (QuantizationTarget.Weights, "UNIFORM", 16, True),
        (QuantizationTarget.Activation, "LUT_POT_QUANTIZER", 8, True),
        (QuantizationTarget.Activation, "LUT_POT_QUANTIZER", 9, False),
        (QuantizationTarget.Activation, "LUT_SYM_QUANTIZER", 8, False),
        (QuantizationTarget.Activation, "POWER_OF_TWO", 16, True),
    ],
)
def test_what_the_target_can_not_express_is_refused_with_the_layers_name(
    target: QuantizationTarget, method: str, n_bits: int, *, expressed: bool
):
    part = "weights" if target is QuantizationTarget.Weights else "activations"
    fields = {part: {"method": method, "n_bits": n_bits, "training_method": "LSQ"}}
    if expressed:
        resolved(**fields)
    else:
        with pytest.raises(UnsupportedConfigError, match=rf"stem\.conv.*mctq.*{method}"):
            resolved(**fields)


def test_a_layer_that_is_skipped_may_have_any_grid():
    odd = {"method": "LUT_SYM_QUANTIZER", "n_bits": 16, "training_method": "LSQ"}
    assert weight_bits(resolved(weights=odd, rules=[rule("*", weights={"n_bits": 8})]))
    assert weight_bits(resolved(weights=odd, rules=[rule("*", skip=True)])) == {}


# ---- schema ---------------------------------------------------------------------------------------------------------


def test_the_schema_accepts_the_designs_example():
    assert JsonSchema(QuantizationRecipe.model_json_schema()).accepts(yaml.safe_load(DESIGN))


@pytest.mark.parametrize(
    "document",
    [
        {"weights": {**WEIGHTS, "n_bits": 40}},
        {"weights": {"method": "SYMMETRIC", "n_bits": 4}},
        {"weights": {**WEIGHTS, "training_method": ""}},
        {"weights": {**WEIGHTS, "per_channel": 0}},
        {"weights": {**WEIGHTS, "candidates": [0]}},
        {"activations": {**ACTIVATIONS, "per_channel": True}},
        {"activations": {**ACTIVATIONS, "placement": "middle"}},
        {"calibration": {"weights": "best"}},
        {"calibration": {"percentile": 0}},
        {"calibration": {"percentile": 101}},
        {"target": "elsewhere"},
        {"bias": "int8"},
        {"rules": [{"match": {"op": "conv"}, "bias": "int8"}]},
        {"rules": [{"skip": True}]},
        {"rule": []},
        {"schema_version": 2},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_recipe_refuses(document: dict[str, Any]):
    with pytest.raises(ValidationError):
        QuantizationRecipe.model_validate(document)
    assert not JsonSchema(QuantizationRecipe.model_json_schema()).accepts(document)


def test_the_schema_is_published(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["QuantizationRecipe"] == QuantizationRecipe.model_json_schema()
