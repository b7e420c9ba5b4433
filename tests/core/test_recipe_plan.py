"""What becomes of each layer, and what a wrapped model knows about itself."""

from tests.core.home_backend import weights_config
from trainable_core.recipe.document import SKIPPED, QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.recipe.plan import QuantizerPlan
from trainable_core.recipe.state import WrappedState


def test_equal_plans_are_equal():
    assert QuantizerPlan(weights_config(), "LSQ") == QuantizerPlan(weights_config(), "LSQ", {})
    assert QuantizerPlan(weights_config(), "LSQ") != QuantizerPlan(weights_config(n_bits=8), "LSQ")
    assert LayerInfo("fc", "linear", {"weight": WeightInfo((2, 3), 0)}) != LayerInfo("fc", "linear")


def test_a_state_keeps_the_plans_of_what_can_be_quantized_and_tells_what_rules_skip():
    stuck = LayerInfo("rnn", "recurrent", obstacle="flat copies")
    recipe = QuantizationRecipe.of(
        {
            "weights": {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"},
            "rules": [{"match": {"name": "head"}, "skip": True}, {"match": {"name": "lstm"}, "skip": True}],
        }
    )
    weights = {"weight": WeightInfo((2, 3), 0)}
    layers = [LayerInfo("fc", "linear", weights), LayerInfo("head", "linear", weights), stuck]
    layers.append(LayerInfo("lstm", "recurrent", obstacle="flat copies"))
    state = WrappedState(recipe)
    assert [plan.layer.name for plan in state.note(recipe.resolve(layers))] == ["fc"]
    assert set(state.plans) == {"fc", "head"}
    assert state.left_out == {"head": SKIPPED, "lstm": SKIPPED}


def test_two_models_share_no_state():
    first, second = WrappedState(QuantizationRecipe()), WrappedState(QuantizationRecipe())
    first.left_out["fc"] = first.folded["bn"] = "reason"
    assert (second.plans, second.left_out, second.folded, second.finalized) == ({}, {}, {}, False)
