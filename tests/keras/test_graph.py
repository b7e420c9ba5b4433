"""What is asked of a Keras model's graph, on graphs made by hand."""

from types import SimpleNamespace

import pytest

from trainable_keras.graph import Call, Graph


class Dropout:
    name = "dropout"


class Layer:
    def __init__(self, name):
        self.name = name


def tensor():
    return SimpleNamespace(shape=(None, 4))


def chain(*operations, outputs=None):
    """Return the calls of operations one after the other, and the graph whose output is the last one's."""
    calls, current = [], tensor()
    for operation in operations:
        following = tensor()
        calls.append(Call(operation, [current], [following]))
        current = following
    return calls, Graph(calls, [current] if outputs is None else outputs)


CONV, RELU, HEAD = Layer("conv"), Layer("relu"), Layer("head")


def op_of(operation):
    return {"conv": "conv", "relu": "activation", "head": "linear"}.get(operation.name)


def test_calls_and_operations_come_in_order_each_once():
    calls, graph = chain(CONV, RELU, CONV, HEAD)
    assert graph.operations == [CONV, RELU, HEAD]
    assert graph.calls(CONV) == [calls[0], calls[2]]


def test_source_and_only_user_are_neighbours():
    calls, graph = chain(CONV, RELU, HEAD)
    assert graph.source(calls[0]) is None  # an input of the model
    assert graph.source(calls[1]) is calls[0]
    assert graph.only_user(calls[0]) is calls[1]
    assert graph.only_user(calls[2]) is None  # it leaves the model


def test_two_users_are_not_one():
    calls, _ = chain(CONV, RELU)
    second = Call(HEAD, calls[0].outputs, [tensor()])
    graph = Graph([*calls, second], [*calls[1].outputs, *second.outputs])
    assert graph.only_user(calls[0]) is None


def test_what_also_leaves_the_model_has_no_only_user():
    calls, _ = chain(CONV, RELU)
    assert Graph(calls, [calls[0].outputs[0], calls[1].outputs[0]]).only_user(calls[0]) is None


@pytest.mark.parametrize(
    ("after", "expected"), [([RELU], True), ([HEAD], False), ([Dropout(), RELU], True), ([], False)]
)
def test_an_activation_after_is_seen_through_what_passes(after, expected):
    calls, graph = chain(CONV, *after)
    assert graph.activation_after(calls[0], op_of) is (calls[-1] if expected else None)


def test_layers_that_are_gone_do_not_count():
    norm = Layer("norm")
    calls, graph = chain(CONV, norm, RELU)
    assert graph.activation_after(calls[0], op_of) is None
    assert graph.activation_after(calls[0], op_of, {id(norm)}) is calls[-1]
