"""Groups of variables for an optimizer each."""

from types import SimpleNamespace

import pytest

from trainable_core.backend.variable_groups import variable_groups
from trainable_core.errors import InvalidArgumentError

WEIGHT, THRESHOLD = object(), object()
LEARNING = SimpleNamespace(get_trainable_variables=lambda group: [THRESHOLD])
FROZEN = SimpleNamespace(get_trainable_variables=lambda group: [])


def test_quantizers_variables_are_apart_and_without_decay():
    assert variable_groups([WEIGHT, THRESHOLD], [LEARNING], {"lr": 1.0}, {"lr": 0.1}) == [
        {"params": [WEIGHT], "name": "WEIGHTS", "lr": 1.0},
        {"params": [THRESHOLD], "name": "QPARAMS", "weight_decay": 0.0, "lr": 0.1},
    ]


def test_a_decay_that_is_asked_for_is_kept():
    (group,) = variable_groups([THRESHOLD], [LEARNING], None, {"weight_decay": 0.5})
    assert group["weight_decay"] == 0.5


def test_a_variable_that_two_quantizers_share_comes_once():
    assert variable_groups([THRESHOLD], [LEARNING, LEARNING], None, None)[0]["params"] == [THRESHOLD]


def test_groups_without_variables_are_left_out():
    assert [group["name"] for group in variable_groups([WEIGHT], [FROZEN], None, None)] == ["WEIGHTS"]
    assert variable_groups([], [], None, None) == []


@pytest.mark.parametrize("options", [{"params": []}, {"name": "x"}, 3])
@pytest.mark.parametrize("part", ["weights", "qparams"])
def test_options_that_are_none_are_refused(part, options):
    given = {"weights": None, "qparams": None, part: options}
    with pytest.raises(InvalidArgumentError, match=f"parameter_groups: {part}"):
        variable_groups([], [], **given)
