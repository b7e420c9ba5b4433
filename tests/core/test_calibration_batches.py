"""The batches that a model is calibrated with."""

import numpy as np
import pytest

from trainable_core.backend import reconstruction
from trainable_core.calibration import batch_norm
from trainable_core.calibration.batches import check_batches, feed, in_a_list, inputs_of
from trainable_core.errors import CalibrationError


class Ragged(list):
    """A tensor that is no array, as TensorFlow's ragged ones."""

    dtype, shape = "float32", (2, None)


@pytest.mark.parametrize(
    ("batches", "forward", "fact"),
    [
        (None, None, "2 activation quantizers"),
        (3, None, "int"),
        ("abc", None, "str"),
        ({"a": 1}, None, "dict"),
        (np.zeros((2, 3)), None, "ndarray"),
        (Ragged(), None, "Ragged"),
        ((np.zeros((2, 3)), np.zeros(2)), None, r"\[\(x, y\)\]"),
        ((np.zeros((2, 3)), np.zeros((2, 1))), None, "inputs and labels"),
        ((np.zeros(2), np.zeros(2, np.int64)), None, "inputs and labels"),
        ((np.zeros((2, 3)), np.zeros(2), np.zeros(2)), None, "inputs and labels"),
        ((np.zeros((2, 3)), None), None, "inputs and labels"),
        (({"a": np.zeros(2)}, np.zeros(2)), None, "inputs and labels"),
        ([1], 3, "callable"),
    ],
)
def test_batches_that_cannot_be_iterated_over_are_refused(batches, forward, fact):
    with pytest.raises(CalibrationError, match=fact):
        check_batches(batches, forward, 2)


@pytest.mark.parametrize(
    "batches",
    [
        [np.zeros((2, 3)), np.zeros((2, 3))],
        [np.zeros((2, 3)), np.zeros((2, 5))],
        (np.zeros((2, 3)), np.zeros((2, 3))),
        (np.zeros((2, 3)), np.zeros((1, 3)), np.zeros((2, 3))),
        (np.zeros((2, 3)),),
        (),
        [(np.zeros((2, 3)), np.zeros(2))],
        ((np.zeros((2, 3)), np.zeros(2)),),
        ({"a": np.zeros(2)}, {"a": np.zeros(2)}),
        iter([np.zeros((2, 3))]),
    ],
    ids=[
        "list",
        "rows of several lengths",
        "tuple",
        "a last one of fewer rows",
        "one",
        "none",
        "list of one with labels",
        "tuple of one with labels",
        "tuple of mappings",
        "generator",
    ],
)
def test_what_can_only_be_batches_is_accepted(batches):
    check_batches(batches, None, 2)


@pytest.mark.parametrize("check_request", [batch_norm.check_request, reconstruction.check_request])
@pytest.mark.parametrize("batches", [np.zeros((2, 3)), (np.zeros((2, 3)), np.zeros(2))], ids=["tensor", "labels"])
def test_one_batch_is_refused_by_whatever_takes_several(check_request, batches):
    with pytest.raises(CalibrationError, match=r"pass \[(batch|\(x, y\))\]"):
        check_request(["a layer"], batches, None)


def test_one_batch_is_put_into_a_list_where_it_is_understood():
    x, y = np.zeros((2, 3)), np.zeros(2)
    assert [len(in_a_list(batches)) for batches in (x, {"a": x}, (x, y))] == [1, 1, 1]
    for batches in ([x, y], (x, x), [(x, y)], iter([x])):
        assert in_a_list(batches) is batches


def test_every_batch_is_called_and_none_is_an_error():
    seen = []
    feed(iter([1, 2]), seen.append)
    assert seen == [1, 2]
    with pytest.raises(CalibrationError, match="empty"):
        feed([], seen.append)


def test_inputs_of_a_batch_are_its_first_item_or_itself():
    assert inputs_of((1, 2)) == 1
    assert inputs_of([3]) == 3
    assert inputs_of({"a": 1}) == {"a": 1}
    with pytest.raises(CalibrationError, match="empty tuple"):
        inputs_of(())
