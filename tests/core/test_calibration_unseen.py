"""The reason why a quantizer saw nothing."""

from __future__ import annotations

import pytest

from trainable_core.calibration.unseen import Sight, call_text, reason, value_text

NOTHING = Sight()


def test_a_sight_notes_each_thing_once():
    sight = Sight()
    for _ in range(2):
        sight.called(1, ["mask"])
        sight.reached("an empty tensor")
        sight.read("linear")
    assert (sight.calls, sight.values, sight.readers) == (
        ["with 1 positional argument and mask="],
        ["an empty tensor"],
        ["linear"],
    )
    assert not sight.seen
    sight.reached("")
    assert sight.seen


@pytest.mark.parametrize(
    ("dtype", "size", "floating", "text"),
    [
        ("int64", 0, False, "an int64 tensor"),
        ("bool", 4, False, "a bool tensor"),
        ("bfloat16", 0, True, "an empty tensor"),
        ("bfloat16", 1, True, ""),
    ],
)
def test_what_a_tensor_is(dtype: str, size: int, text: str, *, floating: bool):
    assert value_text(dtype, size, floating=floating) == text


def test_how_a_layer_was_called():
    assert call_text(2, ["mask", "scale"]) == "with 2 positional arguments and mask= and scale="


REASONS = [
    (NOTHING, None, False, "no batch reached its layer in evaluation mode"),
    (NOTHING, NOTHING, False, "no batch reached its layer in evaluation mode or in training mode"),
    (NOTHING, Sight(seen=True), False, "its layer runs only in training mode"),
    (NOTHING, Sight(calls=["with x="]), False, "its layer runs only in training mode"),
    (NOTHING, Sight(calls=["with x="]), True, "its layer was called with x=, which does not pass 'input'"),
    (NOTHING, Sight(values=["an empty tensor"]), True, "it got an empty tensor, which holds no values to quantize"),
    (
        Sight(values=["an int64 tensor"], calls=["with 1 positional argument"]),
        Sight(seen=True),
        False,
        "it got an int64 tensor, which holds no values to quantize",
    ),
    (Sight(readers=["linear"]), NOTHING, False, "its layer is never called: linear read its weights directly"),
    (
        NOTHING,
        Sight(readers=["T", "conv2d"]),
        False,
        "its layer is never called: T and conv2d read its weights directly",
    ),
]


@pytest.mark.parametrize(("evaluated", "trained", "looked", "text"), REASONS)
def test_the_reason_follows_from_what_was_seen(evaluated: Sight, trained: Sight | None, text: str, *, looked: bool):
    assert reason("input", evaluated, trained, looked_in_training=looked) == text


def test_an_output_that_is_not_a_tensor_has_another_reason_than_an_argument():
    assert reason("output", Sight(calls=["with x="]), None) == "its layer was called with x= and gave no output"
