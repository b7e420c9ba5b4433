"""What a backend tells about a model's layers."""

import pytest

from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError
from trainable_core.recipe.layers import INTEGER_INPUT_OPS, OPS, LayerKind, WeightInfo, declared_kind, layer_info


def test_op_kinds_are_distinct_words():
    assert len(set(OPS)) == len(OPS)
    assert set(OPS) > INTEGER_INPUT_OPS


def test_a_users_layer_kind_is_checked_part_by_part():
    assert declared_kind("linear", None, ["x"]) == LayerKind("linear", {}, ("x",))
    for wrong in (("dense", None, ()), ("linear", {"w": 1.5}, ()), ("linear", {"w": True}, ()), ("linear", {}, "x")):
        with pytest.raises(InvalidArgumentError, match="register_layer"):
            declared_kind(*wrong)


KIND = LayerKind("conv", {"kernel": -1})


def test_a_layers_weights_are_told_with_shape_and_axis():
    info = layer_info("stem", None, KIND, {"kernel": (3, 3, 1, 4)}.get)
    assert (info.name, info.op, info.weights) == ("stem", "conv", {"kernel": WeightInfo((3, 3, 1, 4), 3, 2)})


def test_a_weight_that_the_layer_lacks_is_named():
    with pytest.raises(ModelError, match=r"'stem' has no weight 'kernel'(.|\n)*register_layer\(list"):
        layer_info("stem", [], KIND, {}.get)


@pytest.mark.parametrize("axis", [4, -5])
def test_an_axis_that_the_weight_lacks_is_refused(axis):
    with pytest.raises(ShapeMismatchError, match=r"stem\.kernel"):
        layer_info("stem", None, LayerKind("conv", {"kernel": axis}), {"kernel": (3, 3, 1, 4)}.get)
