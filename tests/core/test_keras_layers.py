"""Which layer types are what, on a Keras of a few lines."""

import pytest

from tests.core.numpy_backend import Variable
from tests.core.toy_keras import LAYERS, Add, Dense, EinsumDense, Foreign, Layer
from trainable_core.errors import InvalidArgumentError, ModelError, ShapeMismatchError
from trainable_core.recipe.layers import LayerKind, WeightInfo
from trainable_keras.layers import KINDS, LayerTypes, find_weight, layer_info, weight_path


@pytest.fixture
def types():
    return LayerTypes(LAYERS)


def find(layer, attribute):
    return find_weight(layer, attribute, Variable)


def test_a_kind_is_found_by_class_and_a_subclass_is_of_its_kind(types):
    mine = type("Mine", (Dense,), {})
    assert types.kind_of(Dense()) == types.kind_of(mine()) == KINDS["Dense"]
    assert [types.stock(Dense()), types.stock(mine())] == ["Dense", ""]


def test_a_foreign_class_of_a_known_name_is_of_no_kind(types):
    assert types.kind_of(type("Conv2D", (Layer,), {})()) is None


def test_what_is_registered_comes_before_the_table_and_is_this_keras_alone(types):
    mine = type("Mine", (Dense,), {})
    types.register(mine, "conv", {"kernel": 0}, ("x",))
    assert types.kind_of(mine()) == LayerKind("conv", {"kernel": 0}, ("x",))
    assert LayerTypes(LAYERS).kind_of(mine()).op == "linear"


@pytest.mark.parametrize(("cls", "op"), [(3, "conv"), (int, "conv"), (Dense, "convolution")])
def test_what_can_not_be_registered_is_refused(types, cls, op):
    with pytest.raises(InvalidArgumentError, match="register_layer"):
        types.register(cls, op, None, ("inputs",))


def test_the_axis_of_an_einsum_comes_from_its_equation(types):
    layer = EinsumDense()
    assert types.kind_of(layer).weights == {"kernel": 1}
    layer.equation = "ab,b->a"
    kind = types.kind_of(layer)
    assert dict(kind.weights) == {}
    assert "no axis of its kernel" in kind.unsupported


def test_a_list_of_inputs_has_as_many_as_the_layer_was_built_with(types):
    assert types.kind_of(Add()).inputs == ("inputs.0", "inputs.1")


def test_a_path_leads_into_sublayers_with_and_without_an_underscore():
    outer, query = Layer("outer"), Dense("query")
    vars(outer)["_query"] = query
    assert weight_path(outer, "query.kernel") == [(outer, "_query"), (query, "kernel")]
    assert find(outer, "query.kernel") is query.kernel
    assert find(outer, "query.kernal") is None
    assert find(outer, "key.kernel") is None
    assert find(outer, "query") is None  # a layer, no variable


def test_a_layers_weights_are_told_with_their_shapes_and_axes():
    info = layer_info("fc", Foreign(), LayerKind("linear", {"matrix": -2}), find)
    assert (info.name, info.op, info.weights) == ("fc", "linear", {"matrix": WeightInfo((1, 2), 0)})


@pytest.mark.parametrize(
    ("weights", "error", "fact"),
    [({"matrx": 0}, ModelError, "no weight 'matrx'"), ({"matrix": 2}, ShapeMismatchError, "foreign.matrix")],
)
def test_a_kind_that_does_not_fit_its_layer_is_refused(weights, error, fact):
    with pytest.raises(error, match=fact):
        layer_info("foreign", Foreign(), LayerKind("linear", weights), find)


def test_a_layer_that_is_not_built_has_no_weights_yet():
    layer = Foreign()
    layer.built = False
    with pytest.raises(ModelError, match="no weights yet"):
        layer_info("fc", layer, LayerKind("linear", {"matrix": -1}), find)
