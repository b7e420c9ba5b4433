"""Modifiers in recipes and plans: what pydantic checks, what only building can tell, and what a plugin adds."""

import pytest
from pydantic import ValidationError

from trainable_core import QuantizationRecipe
from trainable_core.documents.plan import plan_document, plan_from_document
from trainable_core.modifier import BUILT_IN, GradualQuantization, OscillationFreezing, ends_of
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.schedule import CosineAnnealingScheduler

COSINE = {"kind": "cosine", "t_start": 10, "t_end": 90, "initial_val": 0.1, "target_val": 0.01}
WEIGHTS = {"method": "SYMMETRIC", "n_bits": 3, "training_method": "LSQ"}


def recipe_with(modifiers, **more):
    return {"weights": {**WEIGHTS, "modifiers": modifiers}, **more}


def test_a_recipe_keeps_modifiers_through_json():
    recipe = QuantizationRecipe.of(recipe_with({"oscillation_freezing": {"threshold": COSINE, "momentum": 0.02}}))
    assert QuantizationRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.weights.modifiers == {"oscillation_freezing": {"threshold": COSINE, "momentum": 0.02}}


def test_a_rule_changes_them_and_a_plan_has_them():
    recipe = QuantizationRecipe.of(
        recipe_with(
            {"oscillation_freezing": {"threshold": 0.1}},
            rules=[{"match": {"name": "head"}, "weights": {"modifiers": {}}}],
        )
    )
    layers = [LayerInfo(name, "linear", {"weight": WeightInfo((2, 2), 0)}) for name in ("body", "head")]
    body, head = recipe.resolve(layers)
    assert body.weights["weight"].modifiers == {"oscillation_freezing": {"threshold": 0.1}}
    assert head.weights["weight"].modifiers == {}
    assert plan_from_document(plan_document(body)) == body
    assert "modifiers" not in plan_document(head)["weights"]["weight"]  # as releases without modifiers wrote it


@pytest.mark.parametrize(
    ("modifiers", "told"),
    [
        ({"oscillation_dampening": {}}, "strength"),
        ({"oscillation_dampening": {"strength": -1}}, "must not be negative"),
        ({"oscillation_dampening": {"strength": True}}, "must be a number"),
        ({"oscillation_dampening": {"strength": float("nan")}}, "must be a number"),
        ({"oscillation_dampening": {"strength": {**COSINE, "kind": "cosin"}}}, "did you mean 'cosine'"),
        ({"oscillation_dampening": {"strength": {**COSINE, "t_end": 5}}}, "t_end must be greater"),
        ({"oscillation_freezing": {"threshold": 0.1, "momentum": 0}}, "momentum"),
        ({"oscillation_freezing": {"threshold": 0.1, "momentun": 0.1}}, "momentun"),
        ({"gradual_quantization": {"share": 1.5}}, "from 0 to 1"),
        ({"gradual_quantization": 3}, "must be a mapping"),
        ({"no name": {}}, "not the name of a modifier"),
        (["oscillation_freezing"], "must map names"),
    ],
)
def test_wrong_arguments_are_refused_when_the_recipe_is_read(modifiers, told):
    with pytest.raises(ValidationError, match=told):
        QuantizationRecipe.of(recipe_with(modifiers))
    with pytest.raises(ValidationError, match=told):  # in a rule as well
        QuantizationRecipe.of({"weights": WEIGHTS, "rules": [{"match": {"op": "conv"}, **recipe_with(modifiers)}]})


def test_a_stranger_s_modifier_is_only_known_to_who_builds_it():
    recipe = QuantizationRecipe.of(recipe_with({"somebody_s": {"anything": [1, 2]}, "without": None}))
    assert recipe.weights.modifiers == {"somebody_s": {"anything": [1, 2]}, "without": {}}


def test_documents_of_modifiers_are_json_and_come_back():
    freezing = OscillationFreezing(threshold=COSINE)
    assert isinstance(freezing.threshold, CosineAnnealingScheduler)
    assert freezing.model_dump(mode="json") == {"momentum": 0.01, "threshold": COSINE}
    assert OscillationFreezing.model_validate(freezing.model_dump(mode="json")) == freezing
    assert GradualQuantization(share=0.5).model_dump(mode="json") == {"share": 0.5}


def test_every_built_in_is_found_by_its_name():
    assert {name: cls.name for name, cls in BUILT_IN.items()} == {name: name for name in BUILT_IN}
    assert ends_of(0.5) == (0.5, 0.5)
    assert ends_of(CosineAnnealingScheduler(0, 1, 3.0, 2.0)) == (2.0, 3.0)
