"""What a config holds, what it means, and that nothing of it is lost on the way to JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tests.core.home_backend import activation_config, candidates, weights_config
from tests.core.json_schema import JsonSchema
from trainable_core import cli
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
    member,
)
from trainable_core.constants import LUT_VALUES, MIN_THRESHOLD, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import LUT_METHODS, QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.qparams import from_params, variables_from_params
from trainable_core.validation import MAX_THRESHOLD, TABLE_ENDS, check_params, plain

CONFIGS: dict[QuantizationTarget, Any] = {
    QuantizationTarget.Weights: TrainableQuantizerWeightsConfig,
    QuantizationTarget.Activation: TrainableQuantizerActivationConfig,
}
DOCUMENTS = [*CONFIGS.values(), TrainableQuantizerCandidateConfig]

# Arguments of the ancestor's constructors.
ANCESTOR = {
    TrainableQuantizerWeightsConfig: {
        "weights_quantization_method": QuantizationMethod.SYMMETRIC,
        "weights_n_bits": 8,
        "weights_quantization_params": {THRESHOLD: [1.0, 2.0]},
        "enable_weights_quantization": False,
        "weights_channels_axis": 3,
        "weights_per_channel_threshold": True,
        "min_threshold": 0.25,
        "weights_quantization_candidates": candidates(2, 4),
    },
    TrainableQuantizerActivationConfig: {
        "activation_quantization_method": QuantizationMethod.UNIFORM,
        "activation_n_bits": 8,
        "activation_quantization_params": {THRESHOLD: 2.0},
        "enable_activation_quantization": False,
        "min_threshold": 0.25,
        "activation_quantization_candidates": candidates(2, 4),
    },
    TrainableQuantizerCandidateConfig: {"n_bits": 8, "quantization_params": {THRESHOLD: 2.0}},
}

document_classes = pytest.mark.parametrize("cls", DOCUMENTS, ids=lambda cls: cls.__name__)
both_targets = pytest.mark.parametrize("build", [weights_config, activation_config])


class Foreign(Enum):
    """Looks like ``mct_quantizers.QuantizationMethod``, with values of its own."""

    POWER_OF_TWO = "pot"
    LUT_POT_QUANTIZER = "lut pot"
    SYMMETRIC = "sym"
    UNIFORM = "uni"
    LUT_SYM_QUANTIZER = "lut sym"
    LOGARITHMIC = "log"


def spellings(method: QuantizationMethod) -> list[Any]:
    """Return the ways to name a method: member, foreign member, name, value."""
    return [method, Foreign[method.name], method.name, method.value]


# ---- drawn configs --------------------------------------------------------------------------------------------------

# Each way to write numbers that a float32 holds exactly.
MANY = {
    "list": list,
    "tuple": tuple,
    "list of float32": lambda values: [np.float32(value) for value in values],
    "float32 array": lambda values: np.array(values, np.float32),
    "float64 array": lambda values: np.array(values, np.float64),
    "strided array": lambda values: np.repeat(np.array(values, np.float32), 2)[::2],
}
ONE = {
    "float": float,
    "float32": np.float32,
    "float64": np.float64,
    "0-dimensional array": lambda value: np.array(value, np.float32),
    "list": lambda value: [value],
}

magnitudes = st.floats(min_value=2.0**-149, max_value=MAX_THRESHOLD, width=32)
reals = st.floats(min_value=-MAX_THRESHOLD, max_value=MAX_THRESHOLD, width=32)
truths = st.sampled_from([True, False, np.True_, np.False_])


@dataclass(frozen=True)
class Drawn:
    """A config and the plain params that it must hold."""

    config: Any
    params: dict[str, Any]


@st.composite
def written(draw: st.DrawFn, values: list[float], *, channels: int | None) -> tuple[Any, Any]:
    """Draw a way to write numbers; also return them as JSON has them."""
    if channels is None:
        form = draw(st.sampled_from(sorted(ONE)))
        return ONE[form](values[0]), [values[0]] if form == "list" else values[0]
    return MANY[draw(st.sampled_from(sorted(MANY)))](values), values


@st.composite
def params_of(
    draw: st.DrawFn, method: QuantizationMethod, target: QuantizationTarget, n_bits: int, channels: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw legal params, as somebody may write them and as JSON has them."""
    given: dict[str, Any] = {}
    size = 1 if channels is None else channels
    uniform, weights = method is QuantizationMethod.UNIFORM, target is QuantizationTarget.Weights
    kind = draw(st.sampled_from(["none", "sign", "threshold", "range"]))
    if kind == "none":
        return {}, {}
    if kind == "sign" and not uniform and not weights:
        sign = draw(truths)
        return {SIGNED: sign}, {SIGNED: bool(sign)}
    if kind == "range" and uniform:
        pairs = draw(st.lists(st.tuples(reals, reals).filter(lambda p: p[0] != p[1]), min_size=size, max_size=size))
        given[RANGE_MIN] = draw(written([min(pair) for pair in pairs], channels=channels))
        given[RANGE_MAX] = draw(written([max(pair) for pair in pairs], channels=channels))
    else:
        given[THRESHOLD] = draw(written(draw(st.lists(magnitudes, min_size=size, max_size=size)), channels=channels))
        if draw(st.booleans()):
            sign = draw(truths) if uniform or not weights else True
            given[SIGNED] = sign, bool(sign)
    if method in LUT_METHODS:
        ends = TABLE_ENDS[given.get(SIGNED, (True, True))[1]]
        table = draw(st.lists(st.integers(*ends), min_size=1, max_size=2**n_bits))
        forms = [table, tuple(table), np.array(table), np.array(table, np.int16)]
        given[LUT_VALUES] = draw(st.sampled_from(forms)), table
    return {key: value for key, (value, _) in given.items()}, {key: value for key, (_, value) in given.items()}


@st.composite
def configs(draw: st.DrawFn) -> Drawn:
    """Draw any legal config there is."""
    target = draw(st.sampled_from(QuantizationTarget))
    method = draw(st.sampled_from(QuantizationMethod))
    width = draw(st.integers(1, 16))
    channels = draw(st.one_of(st.none(), st.integers(1, 5))) if target is QuantizationTarget.Weights else None
    given, held = draw(params_of(method, target, width, channels))
    prefix = CONFIGS[target].prefix
    fields: dict[str, Any] = {
        f"{prefix}_quantization_method": draw(st.sampled_from(spellings(method))),
        f"{prefix}_n_bits": draw(st.sampled_from([width, np.int64(width), np.uint8(width)])),
        f"{prefix}_quantization_params": given,
        f"enable_{prefix}_quantization": draw(truths),
        "min_threshold": draw(st.sampled_from([0, 0.0, MIN_THRESHOLD, np.float32(0.1), 7])),
    }
    if target is QuantizationTarget.Weights:
        axes = [0, -1, np.int32(3)]
        fields["weights_channels_axis"] = draw(st.sampled_from([None, *axes] if channels is None else axes))
        fields["weights_per_channel_threshold"] = channels is not None
    widths = draw(st.none() | st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True))
    if widths is not None:
        fields[f"{prefix}_quantization_candidates"] = [
            TrainableQuantizerCandidateConfig(
                n_bits=each, quantization_params=draw(params_of(method, target, each, channels))[0]
            )
            for each in widths
        ]
    return Drawn(CONFIGS[target](**fields), held)


# ---- round trips ----------------------------------------------------------------------------------------------------


@given(drawn=configs())
def test_json_loses_nothing(drawn: Drawn):
    text = drawn.config.model_dump_json()
    back = type(drawn.config).model_validate_json(text)
    assert back == drawn.config
    assert back.model_dump_json() == text


@given(drawn=configs())
def test_plain_python_loses_nothing(drawn: Drawn):
    cls = type(drawn.config)
    assert cls.model_validate(drawn.config.model_dump()) == drawn.config
    assert cls.model_validate(drawn.config.model_dump(mode="json")) == drawn.config
    assert cls.model_validate(json.loads(json.dumps(drawn.config.model_dump(mode="json")))) == drawn.config


@given(drawn=configs())
def test_numpy_is_held_as_plain_numbers_bit_for_bit(drawn: Drawn):
    assert drawn.config.quantization_params == drawn.params
    kinds = {type(item) for value in drawn.config.quantization_params.values() for item in np.ravel(value).tolist()}
    assert kinds <= {bool, int, float}
    assert not any(isinstance(value, np.generic) for value in drawn.config.quantization_params.values())


@given(drawn=configs())
def test_the_schema_accepts_every_config(drawn: Drawn):
    assert JsonSchema(type(drawn.config).model_json_schema()).accepts(drawn.config.model_dump(mode="json"))


@given(drawn=configs())
def test_a_config_with_its_own_params_again_is_the_same_config(drawn: Drawn):
    assert drawn.config.with_params(drawn.params) == drawn.config


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_equals_its_list(dtype: Any):
    values = np.array([0.1, 2.0, 1 / 3], dtype)
    fields = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}
    config = weights_config({THRESHOLD: values}, **fields)
    assert config == weights_config({THRESHOLD: values.tolist()}, **fields)
    assert config.quantization_params[THRESHOLD] == values.tolist()


def test_candidates_keep_order_widths_and_params():
    given = [
        TrainableQuantizerCandidateConfig(n_bits=8, quantization_params={THRESHOLD: np.float32(0.1)}),
        TrainableQuantizerCandidateConfig(n_bits=2),
    ]
    config = weights_config({THRESHOLD: 1.0}, weights_quantization_candidates=given)
    back = TrainableQuantizerWeightsConfig.model_validate_json(config.model_dump_json())
    assert [(c.n_bits, c.quantization_params) for c in back.candidates or []] == [
        (8, {THRESHOLD: float(np.float32(0.1))}),
        (2, {}),
    ]


# ---- fields ---------------------------------------------------------------------------------------------------------


FURTHER = {TrainableQuantizerWeightsConfig: ("weights_group_size", "weights_group_axis", "weights_expert_axis")}
"""Fields that the ancestor has not."""


@document_classes
def test_the_fields_are_the_ancestors_arguments_and_a_version(cls: type[BaseModel]):
    assert set(cls.model_fields) == {*ANCESTOR[cls], "schema_version", *FURTHER.get(cls, ())}


@document_classes
def test_a_field_holds_what_it_was_given(cls: type[BaseModel]):
    document = cls(**ANCESTOR[cls])
    assert {name: getattr(document, name) for name in ANCESTOR[cls]} == ANCESTOR[cls]


@document_classes
def test_no_field_can_be_set_again(cls: type[BaseModel]):
    document = cls(**ANCESTOR[cls])
    for name, value in ANCESTOR[cls].items():
        with pytest.raises(ValidationError, match=name):
            setattr(document, name, value)


@document_classes
def test_every_document_carries_its_version(cls: type[BaseModel]):
    assert json.loads(cls(**ANCESTOR[cls]).model_dump_json())["schema_version"] == 1


@both_targets
def test_what_may_be_left_out(build: Any):
    config = build()
    assert (config.enabled, config.min_threshold, config.candidates, config.channels_axis) == (
        True,
        MIN_THRESHOLD,
        None,
        None,
    )


@both_targets
def test_both_configs_answer_to_neutral_names(build: Any):
    config = build({THRESHOLD: 2.0}, method="POWER_OF_TWO", n_bits=3)
    assert config.quantization_method is QuantizationMethod.POWER_OF_TWO
    assert (config.n_bits, config.quantization_params, config.calibrated) == (3, {THRESHOLD: 2.0}, True)
    prefix = config.prefix
    assert getattr(config, f"{prefix}_n_bits") == 3
    assert getattr(config, f"{prefix}_quantization_params") is config.quantization_params


@pytest.mark.parametrize(("build", "target"), list(zip((weights_config, activation_config), CONFIGS, strict=True)))
def test_a_config_names_its_target(build: Any, target: QuantizationTarget):
    assert build().target is target


def test_an_axis_counts_only_per_channel():
    assert weights_config(weights_channels_axis=1).channels_axis is None
    assert weights_config(weights_channels_axis=1, weights_per_channel_threshold=True).channels_axis == 1


@pytest.mark.parametrize("given", [[1.0, 2.0], np.array([1.0, 2.0])], ids=["list", "array"])
def test_what_happens_to_the_params_given_does_not_reach_the_config(given: Any):
    params = {THRESHOLD: given}
    config = weights_config(params, weights_channels_axis=0, weights_per_channel_threshold=True)
    given[0] = -1.0
    params[RANGE_MIN] = given
    assert config.quantization_params == {THRESHOLD: [1.0, 2.0]}


def test_other_params_make_another_config():
    config = weights_config(
        {THRESHOLD: 1.0}, weights_channels_axis=1, min_threshold=0.5, enable_weights_quantization=False
    )
    other = config.with_params({THRESHOLD: np.float32(2.0)})
    assert other.quantization_params == {THRESHOLD: 2.0}
    assert config.quantization_params == {THRESHOLD: 1.0}
    assert other.model_dump(exclude={"weights_quantization_params"}) == config.model_dump(
        exclude={"weights_quantization_params"}
    )


def test_other_params_are_checked_too():
    with pytest.raises(ValidationError, match=r"weights_quantization_params.*positive"):
        weights_config({THRESHOLD: 1.0}).with_params({THRESHOLD: -1.0})


@pytest.mark.parametrize("width", range(1, 17))
@both_targets
def test_every_width_from_1_to_16_is_legal(build: Any, width: int):
    assert build(n_bits=width).n_bits == width


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
@both_targets
def test_a_width_may_be_a_numpy_integer(build: Any, kind: Any):
    width = build(n_bits=kind(4)).n_bits
    assert (width, type(width)) == (4, int)


# ---- enums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QuantizationMethod, ids=str)
@both_targets
def test_a_method_is_given_by_member_foreign_member_name_or_value(build: Any, method: QuantizationMethod):
    for spelling in spellings(method):
        assert build(method=spelling).quantization_method is method


def test_a_member_is_found_in_any_enum():
    assert member(TrainingMethod, "LSQ") is TrainingMethod.LSQ
    assert member(QuantizationTarget, "Weights") is QuantizationTarget.Weights


# What equals a value without being one: True == 1 and 2.0 == 2.
@pytest.mark.parametrize("value", [True, 2.0, 5, -1, "2", "symmetric", None, Foreign.LOGARITHMIC, b"SYMMETRIC", [2]])
def test_what_names_no_member_is_refused_with_the_names_there_are(value: Any):
    with pytest.raises(ValueError, match=f"{', '.join(QuantizationMethod.__members__)}"):
        member(QuantizationMethod, value)


def test_a_misspelt_member_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean SYMMETRIC"):
        member(QuantizationMethod, "SYMETRIC")


# ---- params and what they mean --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", QuantizationMethod, ids=str)
@both_targets
def test_empty_params_mean_not_calibrated(build: Any, method: QuantizationMethod):
    config = build({}, method=method)
    assert not config.calibrated
    assert variables_from_params(config.quantization_params, method) == {}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("method", [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO], ids=str)
def test_an_activations_sign_may_be_decided_before_its_threshold(method: QuantizationMethod, *, signed: bool):
    config = activation_config({SIGNED: signed}, method=method)
    assert config.signed is signed
    assert not config.calibrated
    assert variables_from_params(config.quantization_params, method) == {}


def test_a_grid_is_signed_unless_told_otherwise():
    assert activation_config({THRESHOLD: 1.0}).signed
    assert not activation_config({THRESHOLD: 1.0, SIGNED: False}).signed


@pytest.mark.parametrize(
    ("params", "low", "high"),
    [
        ({THRESHOLD: 2.0}, -2.0, 2.0),
        ({THRESHOLD: 2.0, SIGNED: True}, -2.0, 2.0),
        ({THRESHOLD: 2.0, SIGNED: False}, 0.0, 2.0),
        ({RANGE_MIN: -0.5, RANGE_MAX: 2.0}, -0.5, 2.0),
    ],
)
@both_targets
def test_a_uniform_threshold_is_a_range(build: Any, params: dict[str, Any], low: float, high: float):
    config = build(params, method="UNIFORM")
    variables = variables_from_params(config.quantization_params, config.quantization_method)
    assert {name: value.tolist() for name, value in variables.items()} == {RANGE_MIN: low, RANGE_MAX: high}


@pytest.mark.parametrize(("signed", "low"), [(True, [-1.0, -4.0]), (False, [0.0, 0.0])])
def test_a_uniform_threshold_per_channel_is_a_range_per_channel(low: list[float], *, signed: bool):
    params = {THRESHOLD: [1.0, 4.0], SIGNED: signed}
    config = weights_config(params, method="UNIFORM", weights_channels_axis=0, weights_per_channel_threshold=True)
    variables = variables_from_params(config.quantization_params, config.quantization_method)
    assert {name: value.tolist() for name, value in variables.items()} == {RANGE_MIN: low, RANGE_MAX: [1.0, 4.0]}


@pytest.mark.parametrize(("signed", "zero_point"), [(True, 8), (False, 0)])
def test_a_uniform_threshold_makes_the_grid_of_that_range(zero_point: int, *, signed: bool):
    # 4 bits: 15 steps; [-7.5, 7.5] has steps of 1 and its zero, 7.5 steps up, goes to the even code 8.
    threshold = 7.5 if signed else 15.0
    qparams = from_params(QuantizationMethod.UNIFORM, 4, signed, {THRESHOLD: threshold, SIGNED: signed})
    assert (float(qparams.scale), int(qparams.zero_point), qparams.quant_min, qparams.quant_max) == (
        1.0,
        zero_point,
        0,
        15,
    )


def test_one_value_per_channel_and_one_for_all_are_both_legal_per_channel():
    for threshold in (2.0, [2.0], [1.0, 2.0, 3.0]):
        config = weights_config({THRESHOLD: threshold}, weights_channels_axis=0, weights_per_channel_threshold=True)
        assert config.quantization_params[THRESHOLD] == threshold


def test_the_number_of_channels_is_counted():
    method, target = QuantizationMethod.SYMMETRIC, QuantizationTarget.Weights
    assert check_params({}, method, 4, target) is None
    assert check_params({THRESHOLD: 1.0}, method, 4, target) is None
    assert check_params({THRESHOLD: [1.0, 2.0]}, method, 4, target) == 2
    assert check_params({RANGE_MIN: [0.0] * 3, RANGE_MAX: [1.0] * 3}, QuantizationMethod.UNIFORM, 4, None) == 3


def test_numpy_inside_of_lists_and_mappings_becomes_plain():
    given = {"a": (np.float32(0.5), [np.int64(1), np.array([True])]), "b": "text", "c": None}
    assert plain(given) == {"a": [0.5, [1, [True]]], "b": "text", "c": None}


def test_the_largest_threshold_is_legal():
    assert weights_config({THRESHOLD: MAX_THRESHOLD}).quantization_params == {THRESHOLD: MAX_THRESHOLD}


# ---- schema ---------------------------------------------------------------------------------------------------------


@document_classes
def test_the_schema_knows_the_fields_of_the_model(cls: type[BaseModel]):
    schema = cls.model_json_schema()
    assert set(schema["properties"]) == set(cls.model_fields)
    assert set(schema.get("required", [])) == {name for name, field in cls.model_fields.items() if field.is_required()}


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_n_bits": 0},
        {"weights_n_bits": 17},
        {"weights_n_bits": 8.5},
        {"weights_n_bits": True},
        {"weights_quantization_method": "LOGARITHMIC"},
        {"weights_quantization_params": None},
        {"weights_channels_axis": "last"},
        {"min_threshold": -1},
        {"min_threshold": 2.0**101},
        {"enable_weights_quantization": 1},
        {"weights_quantization_candidates": [{"n_bits": 40}]},
        {"weights_quantization_candidates": [{"bits": 4}]},
        {"schema_version": 2},
        {"weights_bits": 4},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_config_refuses(changes: dict[str, Any]):
    document = {**weights_config({THRESHOLD: 1.0}).model_dump(mode="json"), **changes}
    with pytest.raises(ValidationError):
        TrainableQuantizerWeightsConfig.model_validate(document)
    assert not JsonSchema(TrainableQuantizerWeightsConfig.model_json_schema()).accepts(document)


def test_the_schemas_are_published(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["schema"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert {cls.__name__: published[cls.__name__] for cls in DOCUMENTS} == {
        cls.__name__: cls.model_json_schema() for cls in DOCUMENTS
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"typ": "string"},
        {"type": "text"},
        {"$ref": "#/$defs/Nothing"},
        {"properties": {}, "required": ["a"]},
        {"ge": 1},
    ],
    ids=str,
)
def test_what_is_no_schema_is_noticed(schema: dict[str, Any]):
    with pytest.raises(ValueError, match=r"unknown|no definition|required"):
        JsonSchema({"type": "object", "properties": {"field": schema}})
