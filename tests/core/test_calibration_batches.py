"""The batches that a model is calibrated with."""

import pytest

from trainable_core.calibration.batches import check_batches, feed, inputs_of
from trainable_core.errors import CalibrationError


@pytest.mark.parametrize(
    ("batches", "forward", "single", "fact"),
    [
        (None, None, False, "2 activation quantizers"),
        (3, None, False, "int"),
        ("abc", None, False, "str"),
        ({"a": 1}, None, False, "dict"),
        ([1], None, True, "list"),
        ([1], 3, False, "callable"),
    ],
)
def test_batches_that_cannot_be_iterated_over_are_refused(batches, forward, single, fact):
    with pytest.raises(CalibrationError, match=fact):
        check_batches(batches, forward, 2, single=single)


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
