"""Blocks of a tensor that have a scale each: in core's layout, in configs, in recipes, and in calibration."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from trainable_core import QuantizationRecipe, TrainableQuantizerWeightsConfig
from trainable_core.backend.description import granularity_of
from trainable_core.calibration.params import calibrate_weights
from trainable_core.errors import ShapeMismatchError, UnsupportedConfigError
from trainable_core.granularity import Blocks
from trainable_core.qparams import shape_with, variable_shape
from trainable_core.recipe.layers import LayerInfo, WeightAxes, WeightInfo, declared_kind, layer_info
from trainable_core.recipe.sections import WeightsSection, with_changes
from trainable_core.targets.known import TARGETS

FC = LayerInfo("fc", "linear", {"weight": WeightInfo((4, 64), 0, 1)})
STEM = LayerInfo("stem", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0, 1)})
DEEP = LayerInfo("deep", "depthwise_conv", {"kernel": WeightInfo((3, 3, 8, 1), 2)})
EXPERTS = LayerInfo("experts", "linear", {"up": WeightInfo((2, 4, 64), 1, 2, 0)})


def weights(**more: Any) -> dict[str, Any]:
    return {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ", **more}


def config(**more: Any) -> TrainableQuantizerWeightsConfig:
    fields = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 4, "weights_quantization_params": {}}
    channels = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}
    return TrainableQuantizerWeightsConfig(**{**fields, **channels, **more})


GROUPS = {"weights_group_size": 2, "weights_group_axis": 1}


# ---- the layout -----------------------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, blocks: Blocks) -> list[list[float]]:
    """Return the elements of each block, found one by one."""
    found: dict[tuple[int, ...], list[float]] = {}
    for place in np.ndindex(x.shape):
        key = tuple(place[axis] for axis in blocks.axes)
        if blocks.group_axis is not None:
            key += (place[blocks.group_axis] // blocks.group_size,)
        found.setdefault(key, []).append(float(x[place]))
    return [sorted(found[key]) for key in sorted(found)]


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((4, 6), Blocks((0,), 1, 2)),
        ((6, 4), Blocks((1,), 0, 3)),
        ((4, 6), Blocks((-2,), -1, 6)),
        ((4, 6), Blocks((0,), 1, 32)),
        ((5, 4, 3, 2), Blocks((0,), 1, 2)),
        ((3, 2, 4, 5), Blocks((3,), 2, 4)),
        ((3, 4, 6), Blocks((0, 1), 2, 3)),
        ((3, 6, 4), Blocks((0, 2), 1, 3)),
        ((3, 4, 6), Blocks((2, 0))),
        ((3, 4), Blocks((0,))),
    ],
    ids=str,
)
def test_rows_are_the_blocks_in_the_order_of_their_indices(shape: tuple[int, ...], blocks: Blocks) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    rows = blocks.rows(x)
    assert [sorted(row) for row in rows.tolist()] == by_hand(x, blocks)
    assert np.array_equal(blocks.tensor(rows, shape), x)
    assert rows.shape[0] == np.prod(blocks.counts(shape))


def test_the_numbers_of_a_layer_have_one_order_in_both_layouts() -> None:
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    outputs_first, outputs_last = Blocks((0,), 1, 4).rows(x), Blocks((1,), 0, 4).rows(x.T)
    assert np.array_equal(np.sort(outputs_first), np.sort(outputs_last))


@pytest.mark.parametrize(
    ("blocks", "fact"),
    [
        (Blocks((0,), 1, 48), "divides the 64 elements of axis 1"),
        (Blocks((0,), 2, 32), r"axis of shape \(4, 64\)"),
        (Blocks((3,)), r"axis of shape \(4, 64\)"),
        (Blocks((1,), 1, 32), "an axis of its own"),
        (Blocks((0, -2)), "an axis of its own"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_a_tensor_are_refused(blocks: Blocks, fact: str) -> None:
    with pytest.raises(ShapeMismatchError, match=fact):
        blocks.layout((4, 64), "fc.weight")


def test_the_message_names_sizes_that_fit() -> None:
    with pytest.raises(ShapeMismatchError, match=r"fc.weight.*\n.*sizes that do: 16, 32"):
        Blocks((0,), 1, 48).counts((4, 64), "fc.weight")


@pytest.mark.parametrize("blocks", [Blocks((0,), 1, 32), Blocks((2, 1)), Blocks((1,), 0, 4)], ids=str)
def test_a_shape_is_found_for_a_number_of_blocks(blocks: Blocks) -> None:
    assert np.prod(blocks.counts(blocks.shape_with(3, 12))) == 12
    with pytest.raises(ShapeMismatchError):
        blocks.shape_with(1, 12)


# ---- configs --------------------------------------------------------------------------------------------------------


def test_a_config_of_groups_goes_through_json() -> None:
    made = config(**GROUPS, weights_quantization_params={"threshold": [1.0, 2.0, 3.0, 4.0]})
    assert TrainableQuantizerWeightsConfig.model_validate(json.loads(made.model_dump_json())) == made
    assert made.blocks == Blocks((0,), 1, 2)
    assert variable_shape(made, (2, 4), "fc") == (4,)
    assert shape_with(made, 2, (4,)) == (4, 2)


def test_experts_are_numbered_before_channels_and_groups() -> None:
    made = config(weights_channels_axis=1, weights_expert_axis=0, weights_group_size=2, weights_group_axis=2)
    assert made.blocks == Blocks((0, 1), 2, 2)
    assert variable_shape(made, (3, 5, 4), "up") == (30,)
    assert config(weights_per_channel_threshold=False, weights_expert_axis=0).blocks == Blocks((0,))


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"weights_group_size": 32}, "weights_group_axis"),
        ({"weights_group_axis": 1}, "weights_group_size"),
        ({**GROUPS, "weights_group_size": 0}, "weights_group_size"),
        ({**GROUPS, "weights_group_size": 2.5}, "weights_group_size"),
        ({**GROUPS, "weights_per_channel_threshold": False}, "parts of channels"),
        ({**GROUPS, "weights_quantization_method": "LUT_SYM_QUANTIZER"}, "LUT_SYM_QUANTIZER"),
    ],
)
def test_half_a_granularity_is_refused(fields: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        config(**fields)


def test_the_number_of_params_is_that_of_the_groups() -> None:
    made = config(**GROUPS, weights_quantization_params={"threshold": [1.0, 2.0, 3.0]})
    with pytest.raises(ShapeMismatchError, match=r"fc: threshold.*1 or 4 values"):
        variable_shape(made, (2, 4), "fc")


def test_a_config_without_blocks_is_what_it_was() -> None:
    assert config().blocks is None
    assert config().channels_axis == 0
    assert config(weights_per_channel_threshold=False).channels_axis is None


# ---- recipes --------------------------------------------------------------------------------------------------------


def plan(layer: LayerInfo, rules: Any = (), target: str = "native", **more: Any) -> TrainableQuantizerWeightsConfig:
    recipe = QuantizationRecipe.model_validate({"weights": weights(**more), "target": target, "rules": list(rules)})
    (made,) = recipe.resolve([layer])
    (only,) = made.weights.values()
    return only.config


@pytest.mark.parametrize(
    ("said", "size", "per_channel"),
    [
        ({}, None, True),
        ({"per_channel": False}, None, False),
        ({"granularity": "tensor"}, None, False),
        ({"granularity": "channel"}, None, True),
        ({"granularity": "group"}, 32, True),
        ({"group_size": 16}, 16, True),
        ({"granularity": "group", "group_size": 64, "per_channel": True}, 64, True),
    ],
    ids=str,
)
def test_a_section_says_granularity_in_words_or_as_before(said: dict[str, Any], size: int | None, per_channel: bool):
    made = plan(FC, **said)
    assert made.weights_group_size == size
    assert made.weights_per_channel_threshold == per_channel
    assert (made.weights_group_axis is None) == (size is None)


@pytest.mark.parametrize(
    ("said", "fact"),
    [
        ({"granularity": "row"}, "granularity"),
        ({"granularity": "groups"}, "did you mean 'group'"),
        ({"granularity": "tensor", "group_size": 32}, "group_size"),
        ({"granularity": "tensor", "per_channel": True}, "per_channel"),
        ({"group_size": 32, "per_channel": False}, "per_channel"),
        ({"group_size": True}, "group_size"),
    ],
    ids=str,
)
def test_granularities_that_contradict_each_other_are_refused(said: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        WeightsSection.model_validate(weights(**said))


@pytest.mark.parametrize(
    ("default", "rule", "size", "per_channel"),
    [
        ({"group_size": 32}, {"per_channel": True}, None, True),
        ({"group_size": 32}, {"per_channel": False}, None, False),
        ({"group_size": 32}, {"granularity": "tensor"}, None, False),
        ({"group_size": 16}, {"granularity": "group"}, 16, True),
        ({"granularity": "group", "group_size": 16}, {"group_size": 64}, 64, True),
        ({"granularity": "tensor"}, {"group_size": 16}, 16, True),
        ({"per_channel": False}, {"granularity": "group"}, 32, True),
        ({"group_size": 16}, {"n_bits": 8}, 16, True),
    ],
)
def test_a_later_rule_wins(default: Any, rule: Any, size: int | None, per_channel: bool) -> None:
    made = plan(FC, [{"match": {"name": "fc"}, "weights": rule}], **default)
    assert (made.weights_group_size, made.weights_per_channel_threshold) == (size, per_channel)


def test_changes_of_other_fields_leave_granularity_alone() -> None:
    assert with_changes({"group_size": 8, "n_bits": 4}, {"n_bits": 2}) == {"group_size": 8, "n_bits": 2}


def test_a_layer_with_fewer_inputs_than_a_group_has_one_group_per_channel() -> None:
    made = plan(STEM, group_size=32)
    assert variable_shape(made, (8, 3, 3, 3), "stem") == (8,)


def test_a_depthwise_convolution_has_one_input_per_output() -> None:
    made = plan(DEEP, group_size=32)
    assert made.blocks is None
    assert made.channels_axis == 2


def test_experts_have_scales_of_their_own_whatever_the_granularity() -> None:
    assert plan(EXPERTS, group_size=16).blocks == Blocks((0, 1), 2, 16)
    assert plan(EXPERTS).blocks == Blocks((0, 1))
    assert plan(EXPERTS, granularity="tensor").blocks == Blocks((0,))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "native"])
def test_targets_without_such_scales_refuse_before_training(target: str) -> None:
    n_bits = 8  # what all of them have
    with pytest.raises(UnsupportedConfigError, match=rf"fc.weight: {target} .*groups.*\n.*target: native"):
        plan(FC, target=target, group_size=32, n_bits=n_bits)
    with pytest.raises(UnsupportedConfigError, match=rf"experts.up: .*{target} .*\n.*target: native"):
        plan(EXPERTS, target=target, n_bits=n_bits)
    activations = {**weights(n_bits=n_bits), "training_method": "DYNAMIC"}
    recipe = QuantizationRecipe.model_validate({"activations": activations, "target": target})
    with pytest.raises(UnsupportedConfigError, match=rf"fc: {target} .*\n.*target: native"):
        recipe.resolve([FC])


def test_a_group_size_that_does_not_divide_is_refused_with_the_layers_name() -> None:
    with pytest.raises(ShapeMismatchError, match=r"fc.weight.*divides the 64 elements"):
        plan(FC, group_size=24)


def test_a_weight_whose_inputs_are_nowhere_known_has_no_groups() -> None:
    odd = LayerInfo("odd", "linear", {"weight": WeightInfo((2, 3, 4), 1)})
    with pytest.raises(UnsupportedConfigError, match=r'odd.weight.*axis.*\n.*"granularity": "channel"'):
        plan(odd, group_size=2)


def test_an_integer_bias_needs_one_scale_for_a_sum_of_products() -> None:
    layer = LayerInfo("fc", "linear", FC.weights, bias="bias")
    recipe = QuantizationRecipe.model_validate({"weights": weights(group_size=32), "bias": "int32", "target": "native"})
    with pytest.raises(UnsupportedConfigError, match=r"fc.bias: bias: int32 is not possible: its sums"):
        recipe.resolve([layer])


def test_dynamic_activations_have_no_place_in_an_integer_model() -> None:
    activations = {**weights(n_bits=8), "training_method": "DYNAMIC", "placement": "integer"}
    recipe = QuantizationRecipe.model_validate({"activations": activations, "target": "native"})
    with pytest.raises(UnsupportedConfigError, match="fc: placement: integer"):
        recipe.resolve([FC])


# ---- what a backend tells of its layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (0, (4, 8), WeightInfo((4, 8), 0, 1)),
        (-1, (4, 8), WeightInfo((4, 8), 1, 0)),
        (-1, (3, 3, 4, 8), WeightInfo((3, 3, 4, 8), 3, 2)),
        (0, (4,), WeightInfo((4,), 0)),
        (-2, (3, 3, 8, 1), WeightInfo((3, 3, 8, 1), 2)),
        (WeightAxes(1, 0), (8, 4, 3, 3), WeightInfo((8, 4, 3, 3), 1, 0)),
        (WeightAxes(-2, -1, 0), (2, 4, 8), WeightInfo((2, 4, 8), 1, 2, 0)),
    ],
    ids=str,
)
def test_inputs_lie_next_to_the_outputs_unless_a_kind_says_otherwise(axes: Any, shape: Any, expected: WeightInfo):
    kind = declared_kind("linear", {"weight": axes}, ("input",))
    assert layer_info("fc", None, kind, lambda _: shape).weights == {"weight": expected}


def test_granularity_is_told_in_words() -> None:
    assert granularity_of(config(weights_per_channel_threshold=False), {}, computed=False) == "tensor"
    made = config(weights_channels_axis=1, weights_expert_axis=0, weights_group_size=2, weights_group_axis=2)
    words = "expert (axis 0), channel (axis 1), group of 2 (axis 2)"
    assert granularity_of(made, {}, computed=False) == words


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile", "kl"])
@pytest.mark.parametrize("grid", ["SYMMETRIC", "UNIFORM"])
def test_a_group_is_calibrated_as_a_tensor_of_its_own(method: str, grid: str) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    blocks = Blocks((1,), 2, 4)
    chosen = {"calibration_method": method, "quantization_method": grid, "n_bits": 4}
    together = calibrate_weights(blocks.rows(x), **chosen, channels_axis=0)
    for channel in range(3):
        for group in range(2):
            alone = calibrate_weights(x[:, channel, 4 * group : 4 * group + 4], **chosen)
            assert {key: value[2 * channel + group] for key, value in together.items()} == alone
