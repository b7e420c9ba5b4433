"""Groups of variables for an optimizer each."""

from types import SimpleNamespace

import pytest

from trainable_core import QuantizationMethod
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


def learning(name, method="SYMMETRIC", width=4, signed=True, parameters=()):
    """Return what is asked of a quantizer with one variable of its grid and one of its own."""
    variables = {name: object()}
    return SimpleNamespace(
        get_trainable_variables=lambda group: [*variables.values(), THRESHOLD],
        grid_parameters=parameters,
        structure=SimpleNamespace(widths=(width,)),
        grid_variables=lambda width: variables,
        quantization_config=SimpleNamespace(quantization_method=QuantizationMethod[method]),
        signed=signed,
    )


@pytest.mark.parametrize(
    ("quantizer", "factor"),
    [
        (learning("threshold"), 4.0**3),
        (learning("threshold", signed=False), 4.0**4),
        (learning("threshold", "POWER_OF_TWO", width=8), 4.0**7),
        (learning("range_max", "UNIFORM", width=2), 4.0**2),
        (learning("log2_threshold", parameters=("log2_threshold",)), 1.0),
    ],
)
def test_the_pace_of_the_scale_multiplies_the_learning_rate_of_thresholds(quantizer, factor):
    groups = variable_groups([], [quantizer], {"lr": 0.5}, None, "scale")
    rates = {len(group["params"]): group["lr"] for group in groups if factor == 1.0}
    assert rates == ({2: 0.5} if factor == 1.0 else {})
    assert [group["lr"] for group in groups] == ([0.5] if factor == 1.0 else [0.5, 0.5 * factor])
    assert {group["weight_decay"] for group in groups} == {0.0}
    (group,) = variable_groups([], [quantizer], {"lr": 0.5}, {"lr": 0.25}, "threshold")
    assert group["lr"] == 0.25


@pytest.mark.parametrize(("pace", "fact"), [("slow", "threshold, scale"), ("scale", "None")])
def test_a_pace_that_is_unknown_or_has_no_learning_rate_is_refused(pace, fact):
    with pytest.raises(InvalidArgumentError, match=fact):
        variable_groups([], [learning("threshold")], None, None, pace)
