"""Which quantizers wait for numbers, and what batches may be."""

from types import SimpleNamespace

import pytest

from trainable_core.calibration.batches import check_batches, feed, inputs_of, waiting_quantizers
from trainable_core.errors import CalibrationError, QuantizerStateError


def quantizer(*, calibrated, enabled=True):
    return SimpleNamespace(calibrated=calibrated, quantization_config=SimpleNamespace(enabled=enabled))


FRESH, DONE, OFF = quantizer(calibrated=False), quantizer(calibrated=True), quantizer(calibrated=False, enabled=False)


def test_those_without_numbers_wait_and_all_when_forced():
    assert waiting_quantizers([FRESH, DONE, OFF], "M", force=False) == {id(FRESH)}
    assert waiting_quantizers([FRESH, DONE, OFF], "M", force=True) == {id(FRESH), id(DONE)}
    assert waiting_quantizers([OFF], "M", force=False) == set()


def test_when_all_have_theirs_force_is_named():
    with pytest.raises(QuantizerStateError, match="force=True"):
        waiting_quantizers([DONE], "M", force=False)


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
def test_what_is_no_batches_is_refused(batches, forward, single, fact):
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
