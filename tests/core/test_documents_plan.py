"""A wrapped model's state and a layer's plan, as documents and back."""

import json

import pydantic
import pytest

from trainable_core.documents.plan import plan_document, plan_from_document, state_document, state_from_document
from trainable_core.errors import InvalidArgumentError
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.state import WrappedState

RECIPE = {
    "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
    "activations": {"method": "UNIFORM", "n_bits": 8, "training_method": "DQA", "candidates": [4, 8]},
    "rules": [{"match": {"name": "stem"}, "weights": {"n_bits": 8}}, {"match": {"op": "embedding"}, "skip": True}],
}
LAYERS = [
    LayerInfo("stem", "conv", {"kernel": WeightInfo((3, 3, 1, 4), -1)}),
    LayerInfo("lookup", "embedding", {"embeddings": WeightInfo((50, 4), 1)}),
]


def state():
    recipe = QuantizationRecipe.of(RECIPE)
    plans = {plan.layer.name: plan for plan in recipe.resolve(LAYERS)}
    return WrappedState(recipe, plans, {"head": "left float"}, {"stem": "norm"}, finalized=True)


def test_a_state_comes_back_from_json():
    assert state_from_document(json.loads(json.dumps(state_document(state())))) == state()


@pytest.mark.parametrize("name", ["stem", "lookup"])
def test_a_plan_comes_back_from_json(name):
    plan = state().plans[name]
    assert plan_from_document(json.loads(json.dumps(plan_document(plan)))) == plan


@pytest.mark.parametrize(
    ("place", "value"),
    [("placement", "between"), ("weights", []), ("weights_info", {"kernel": {}}), ("name", None), ("surprise", 1)],
)
def test_a_wrong_part_of_a_plan_is_named(place, value):
    with pytest.raises(pydantic.ValidationError, match=place):
        plan_from_document({**plan_document(state().plans["stem"]), place: value})


def test_a_missing_part_of_a_plan_is_named():
    for key in plan_document(state().plans["stem"]):
        with pytest.raises(pydantic.ValidationError, match=key):
            plan_from_document({k: v for k, v in plan_document(state().plans["stem"]).items() if k != key})


@pytest.mark.parametrize("target", ["weight", None, [], {}])
def test_a_plan_with_an_unknown_target_is_refused(target):
    document = plan_document(state().plans["stem"])
    document["weights"]["kernel"]["config"]["target"] = target
    with pytest.raises(InvalidArgumentError, match="target"):
        plan_from_document(document)
