"""Bad input, row by row: each is refused by a typed error that names the field, and what was given stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.core.home_backend import (
    GRIDS,
    HomeActivation,
    HomeQuantizer,
    HomeWeights,
    activation_config,
    activation_quantizer,
    candidates,
    weights_config,
    weights_quantizer,
)
from trainable_core import cli, get_trainable_quantizer_class, list_quantizers
from trainable_core.calibration import Observer, calibrate_activation, calibrate_weights
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.constants import LUT_VALUES, RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.errors import (
    CalibrationError,
    DocumentError,
    InvalidArgumentError,
    PluginError,
    QuantizerStateError,
    RuleError,
    ShapeMismatchError,
    TrainableError,
    UnknownBackendError,
    UnsupportedConfigError,
)
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.layers import LayerInfo, WeightInfo
from trainable_core.registry.process import get_backend, register
from trainable_core.schedule import LinearAnnealingScheduler

NAN, INF = math.nan, math.inf
PER_CHANNEL = {"weights_channels_axis": 0, "weights_per_channel_threshold": True}


class Foreign(Enum):
    """An enum without namesakes in ours."""

    LOGARITHMIC = 2


def told(error: BaseException) -> str:
    """Return what an error says of the input, without the input itself: an echo names no field."""
    if isinstance(error, ValidationError):
        details = error.errors(include_input=False, include_url=False, include_context=False)
        return "\n".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
    return str(error)


def as_it_is(subject: Any) -> str:
    """Return all there is to know of something, as text, so that NaN equals NaN."""
    if isinstance(subject, HomeQuantizer):
        own = {name: subject.get_quantizer_variable(name).tolist() for name in subject.variable_names}
        return repr((own, subject.calibrated, subject.signed, subject.freeze_quant_params, subject.tensor_ndim))
    if isinstance(subject, Observer):
        return repr({name: array.tolist() for name, array in subject.state().items()})
    return repr(subject)


Row = tuple[str, Any, Callable[[Any], object], type[Exception], tuple[str, ...]]


def table(*given: Row) -> pytest.MarkDecorator:
    """Parametrize a test with rows of: what is wrong, what is given, the call, the error, what the message says."""
    ids = [row[0] for row in given]
    return pytest.mark.parametrize(("subject", "call", "error", "facts"), [row[1:] for row in given], ids=ids)


def check(subject: Any, call: Callable[[Any], object], error: type[Exception], facts: tuple[str, ...]) -> None:
    """Assert that the call is refused as the row says and leaves its subject alone."""
    before = as_it_is(subject)
    with pytest.raises(error) as caught:
        call(subject)
    assert isinstance(caught.value, TrainableError | ValidationError)
    message = told(caught.value)
    assert [fact for fact in facts if fact not in message] == []
    assert as_it_is(subject) == before


# ---- configs --------------------------------------------------------------------------------------------------------


def weights(what: str, *facts: str, **changes: Any) -> Row:
    """Return a row of a weights config with something wrong; the first fact is the field."""
    good = {"weights_quantization_method": "SYMMETRIC", "weights_n_bits": 8, "weights_quantization_params": {}}
    return what, {**good, **changes}, lambda fields: TrainableQuantizerWeightsConfig(**fields), ValidationError, facts


def activation(what: str, *facts: str, **changes: Any) -> Row:
    """Return a row of an activation config."""
    good = {"activation_quantization_method": "SYMMETRIC", "activation_n_bits": 8, "activation_quantization_params": {}}
    return (
        what,
        {**good, **changes},
        lambda fields: TrainableQuantizerActivationConfig(**fields),
        ValidationError,
        facts,
    )


def params(what: str, method: str, given: Any, *facts: str, **fields: Any) -> Row:
    """Return a row of weights params that don't fit their method."""
    changes = {"weights_quantization_method": method, "weights_quantization_params": given, **fields}
    return weights(f"{method}: {what}", "weights_quantization_params", *facts, **changes)


def candidate(what: str, *facts: str, **fields: Any) -> Row:
    """Return a row of a candidate."""
    return what, fields, lambda given: TrainableQuantizerCandidateConfig(**given), ValidationError, facts


@table(
    weights("no bits", "weights_n_bits", "1", weights_n_bits=0),
    weights("40 bits", "weights_n_bits", "16", weights_n_bits=40),
    weights("negative bits", "weights_n_bits", weights_n_bits=-8),
    weights("bool bits", "weights_n_bits", "integer", weights_n_bits=True),
    weights("NumPy bool bits", "weights_n_bits", "integer", weights_n_bits=np.True_),
    weights("float bits", "weights_n_bits", "integer", weights_n_bits=8.0),
    weights("NumPy float bits", "weights_n_bits", "integer", weights_n_bits=np.float32(8)),
    weights("text bits", "weights_n_bits", "integer", weights_n_bits="8"),
    weights("bits beyond 64 bits", "weights_n_bits", weights_n_bits=10**400),
    weights("a list of bits", "weights_n_bits", weights_n_bits=[8]),
    weights("no bits given", "weights_n_bits", weights_n_bits=None),
    weights("misspelt method", "weights_quantization_method", "SYMMETRIC", weights_quantization_method="SYMETRIC"),
    weights("unknown method", "weights_quantization_method", "UNIFORM", weights_quantization_method="LOG"),
    weights("foreign method", "weights_quantization_method", weights_quantization_method=Foreign.LOGARITHMIC),
    weights("method beyond the last", "weights_quantization_method", weights_quantization_method=5),
    weights("bool method", "weights_quantization_method", weights_quantization_method=True),
    weights("a list of methods", "weights_quantization_method", weights_quantization_method=["SYMMETRIC"]),
    weights("params are None", "weights_quantization_params", "dict", weights_quantization_params=None),
    weights("params are a list", "weights_quantization_params", "dict", weights_quantization_params=[1.0]),
    weights("params keyed by number", "weights_quantization_params.1", weights_quantization_params={1: 2.0}),
    weights("negative min_threshold", "min_threshold", min_threshold=-1.0),
    weights("NaN min_threshold", "min_threshold", "finite", min_threshold=NAN),
    weights("infinite min_threshold", "min_threshold", "finite", min_threshold=INF),
    weights("bool min_threshold", "min_threshold", "number", min_threshold=True),
    weights("text min_threshold", "min_threshold", "number", min_threshold="small"),
    weights("huge min_threshold", "min_threshold", min_threshold=10**400),
    weights("truth by number", "enable_weights_quantization", "boolean", enable_weights_quantization=1),
    weights("truth by text", "weights_per_channel_threshold", "boolean", weights_per_channel_threshold="yes"),
    weights("per channel without axis", "weights_channels_axis", weights_per_channel_threshold=True),
    weights("bool axis", "weights_channels_axis", "integer", weights_channels_axis=True),
    weights("float axis", "weights_channels_axis", "integer", weights_channels_axis=1.0),
    weights("misspelt field", "weights_nbits", weights_nbits=8),
    weights("the other target's field", "activation_n_bits", activation_n_bits=8),
    weights("another version", "schema_version", schema_version=2),
    weights("candidates of none", "weights_quantization_candidates", "empty", weights_quantization_candidates=[]),
    weights(
        "equal candidates",
        "weights_quantization_candidates",
        "[2, 4, 2]",
        weights_quantization_candidates=candidates(2, 4, 2),
    ),
    weights("bare widths", "weights_quantization_candidates.0", weights_quantization_candidates=[2, 4]),
    weights("candidates are a number", "weights_quantization_candidates", weights_quantization_candidates=4),
    weights(
        "wrong candidate",
        "weights_quantization_candidates.1.n_bits",
        weights_quantization_candidates=[{"n_bits": 2}, {"n_bits": 40}],
    ),
    weights(
        "wrong params of a candidate",
        "weights_quantization_candidates.1.quantization_params",
        "'threshold'",
        weights_quantization_candidates=[{"n_bits": 2}, {"n_bits": 4, "quantization_params": {THRESHOLD: -1.0}}],
    ),
    weights(
        "a candidate of fewer channels",
        "weights_quantization_params: 3",
        "weights_quantization_candidates.0.quantization_params: 2",
        weights_quantization_params={THRESHOLD: [1.0, 2.0, 3.0]},
        weights_quantization_candidates=[{"n_bits": 2, "quantization_params": {THRESHOLD: [1.0, 2.0]}}],
        **PER_CHANNEL,
    ),
    activation("no bits", "activation_n_bits", activation_n_bits=0),
    activation("unknown method", "activation_quantization_method", activation_quantization_method="LOG"),
    activation("misspelt field", "activation_bits", activation_bits=8),
    activation("an axis", "weights_channels_axis", weights_channels_axis=0),
    activation("negative min_threshold", "min_threshold", min_threshold=-1.0),
    activation(
        "equal candidates", "activation_quantization_candidates", activation_quantization_candidates=candidates(2, 2)
    ),
    activation(
        "a threshold per channel",
        "activation_quantization_params",
        "2 values",
        activation_quantization_params={THRESHOLD: [1.0, 2.0]},
    ),
    activation(
        "a sign that is no truth",
        "activation_quantization_params",
        "'is_signed'",
        activation_quantization_params={SIGNED: 1},
    ),
    activation(
        "only the sign of a range",
        "activation_quantization_params",
        "'range_min'",
        activation_quantization_method="UNIFORM",
        activation_quantization_params={SIGNED: True},
    ),
    candidate("a candidate of no bits", "n_bits", n_bits=0),
    candidate("a candidate without width", "n_bits", quantization_params={}),
    candidate("a candidate's params are None", "quantization_params", n_bits=2, quantization_params=None),
    candidate("a candidate's misspelt field", "bits", n_bits=2, bits=2),
)
def test_a_config(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


@table(
    params("zero threshold", "SYMMETRIC", {THRESHOLD: 0.0}, "'threshold'", "positive"),
    params("negative threshold", "SYMMETRIC", {THRESHOLD: -2.0}, "'threshold'", "positive"),
    params("NaN threshold", "SYMMETRIC", {THRESHOLD: NAN}, "'threshold'", "finite"),
    params("infinite threshold", "POWER_OF_TWO", {THRESHOLD: INF}, "'threshold'", "finite"),
    params("threshold beyond 2**100", "POWER_OF_TWO", {THRESHOLD: 2.0**101}, "'threshold'", "2**100"),
    params("threshold beyond float64", "SYMMETRIC", {THRESHOLD: 10**400}, "'threshold'", "2**100"),
    params("text threshold", "SYMMETRIC", {THRESHOLD: "2"}, "'threshold'", "number"),
    params("bool threshold", "SYMMETRIC", {THRESHOLD: True}, "'threshold'", "number"),
    params("complex threshold", "SYMMETRIC", {THRESHOLD: 1j}, "'threshold'", "number"),
    params("no threshold", "SYMMETRIC", {SIGNED: True}, "'threshold'"),
    params("threshold is None", "SYMMETRIC", {THRESHOLD: None}, "'threshold'", "number"),
    params("a set of thresholds", "SYMMETRIC", {THRESHOLD: {1.0}}, "'threshold'", "number"),
    params("empty list", "SYMMETRIC", {THRESHOLD: []}, "'threshold'", "empty", **PER_CHANNEL),
    params("empty array", "SYMMETRIC", {THRESHOLD: np.ones(0)}, "'threshold'", "empty", **PER_CHANNEL),
    params("a matrix", "SYMMETRIC", {THRESHOLD: np.ones((2, 2))}, "'threshold'", "number", **PER_CHANNEL),
    params("NaN for one channel", "SYMMETRIC", {THRESHOLD: [1.0, NAN]}, "'threshold'", "finite", **PER_CHANNEL),
    params("zero for one channel", "SYMMETRIC", {THRESHOLD: np.array([1, 0])}, "'threshold'", **PER_CHANNEL),
    params("a list for a tensor", "SYMMETRIC", {THRESHOLD: [1.0, 2.0]}, "2 values", "per tensor"),
    params("an unsigned grid", "SYMMETRIC", {THRESHOLD: 1.0, SIGNED: False}, "'is_signed'"),
    params("misspelt key", "SYMMETRIC", {"treshold": 1.0}, "'treshold'", "did you mean 'threshold'"),
    params("misspelt range", "UNIFORM", {"range_mn": 0, RANGE_MAX: 1}, "'range_mn'", "did you mean 'range_min'"),
    params("a key like no other", "SYMMETRIC", {"scale": 1.0}, "'scale'", "'threshold'"),
    params("a range", "SYMMETRIC", {RANGE_MIN: -1.0, RANGE_MAX: 1.0}, "'range_min'", "'threshold'"),
    params("a table", "UNIFORM", {THRESHOLD: 1.0, LUT_VALUES: [1]}, "'lut_values'"),
    params("empty range", "UNIFORM", {RANGE_MIN: 1.0, RANGE_MAX: 1.0}, "'range_min'", "'range_max'"),
    params("crossed range", "UNIFORM", {RANGE_MIN: 2.0, RANGE_MAX: -2.0}, "'range_min'", "less than"),
    params("NaN end", "UNIFORM", {RANGE_MIN: NAN, RANGE_MAX: 1.0}, "'range_min'", "finite"),
    params("infinite end", "UNIFORM", {RANGE_MIN: 0.0, RANGE_MAX: INF}, "'range_max'", "finite"),
    params("half a range", "UNIFORM", {RANGE_MIN: 0.0}, "range_max"),
    params(
        "range and threshold", "UNIFORM", {RANGE_MIN: 0.0, RANGE_MAX: 1.0, THRESHOLD: 1.0}, "'threshold'", "not both"
    ),
    params(
        "a range against its sign", "UNIFORM", {RANGE_MIN: -1.0, RANGE_MAX: 1.0, SIGNED: False}, "'is_signed'", "-1"
    ),
    params(
        "two axes", "SYMMETRIC", {THRESHOLD: np.ones((2, 1, 3))}, "'threshold'", "more than one axis", **PER_CHANNEL
    ),
    params("ragged lists", "SYMMETRIC", {THRESHOLD: [[1.0], [1.0, 2.0]]}, "'threshold'", "differ", **PER_CHANNEL),
    params("another axis", "SYMMETRIC", {THRESHOLD: np.ones((1, 2, 1))}, "'threshold'", "axis 1", **PER_CHANNEL),
    params("zero threshold", "UNIFORM", {THRESHOLD: 0.0}, "'threshold'", "positive"),
    params(
        "ends of different length",
        "UNIFORM",
        {RANGE_MIN: [0.0, 0.0], RANGE_MAX: [1.0, 1.0, 1.0]},
        "'range_min' has 2",
        "'range_max' has 3",
        **PER_CHANNEL,
    ),
    params(
        "one crossed channel",
        "UNIFORM",
        {RANGE_MIN: [0.0, 1.0], RANGE_MAX: [1.0, 0.5]},
        "'range_min'",
        "[1.0, 0.5]",
        **PER_CHANNEL,
    ),
    params("no table", "LUT_POT_QUANTIZER", {THRESHOLD: 1.0}, "'lut_values'"),
    params("no table", "LUT_SYM_QUANTIZER", {THRESHOLD: 1.0}, "'lut_values'"),
    params("fractions in the table", "LUT_SYM_QUANTIZER", {THRESHOLD: 1.0, LUT_VALUES: [0.5]}, "'lut_values'"),
    params("empty table", "LUT_SYM_QUANTIZER", {THRESHOLD: 1.0, LUT_VALUES: []}, "'lut_values'", "empty"),
    params(
        "more values than codes",
        "LUT_SYM_QUANTIZER",
        {THRESHOLD: 1.0, LUT_VALUES: [-1, 0, 1]},
        "'lut_values'",
        "at most 2",
        weights_n_bits=1,
    ),
)
def test_quantization_params(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


# ---- recipes --------------------------------------------------------------------------------------------------------

WEIGHTS = {"method": "SYMMETRIC", "n_bits": 4, "training_method": "LSQ"}


def recipe(what: str, *facts: str, **fields: Any) -> Row:
    """Return a row of a recipe with something wrong; the first fact is the path of the field."""
    return what, fields, QuantizationRecipe.of, ValidationError, facts


def spec(what: str, *facts: str, **changes: Any) -> Row:
    """Return a row of the weights' part of a recipe."""
    return recipe(what, *facts, weights={**WEIGHTS, **changes})


def rule(what: str, *facts: str, **fields: Any) -> Row:
    """Return a row of a recipe whose second rule is wrong."""
    good = {"match": {"name": "*"}, "skip": True}
    return recipe(what, *facts, weights=WEIGHTS, rules=[good, fields])


@table(
    recipe("misspelt part", "weight", weight=WEIGHTS),
    recipe("a part that is a word", "weights", weights="LSQ"),
    ("keyed by number", {1: WEIGHTS}, QuantizationRecipe.of, ValidationError, ("1: Keys should be strings",)),
    recipe("another version", "schema_version", schema_version=2),
    recipe("unknown target", "target", "'mctq', 'onnx', 'tflite', 'qonnx'", "did you mean 'tflite'", target="tflit"),
    recipe("a target that is no word", "target", "8 is not one of", target=8),
    recipe("unknown bias", "bias", "'float', 'int32'", "did you mean 'int32'", bias="int8"),
    recipe("no bias", "bias", "None is not one of", bias=None),
    recipe("a bias that is a truth", "bias", "True is not one of", bias=True),
    recipe(
        "unknown bias of a rule",
        "rules.0.bias",
        "did you mean 'float'",
        weights=WEIGHTS,
        rules=[{"match": {"op": "linear"}, "bias": "floot"}],
    ),
    recipe("a number for a truth", "fold_batch_norm", fold_batch_norm=1),
    recipe("per channel activations", "activations.per_channel", activations={**WEIGHTS, "per_channel": True}),
    recipe(
        "nowhere",
        "activations.placement",
        "'inputs', 'outputs' or 'integer'",
        activations={**WEIGHTS, "placement": "middle"},
    ),
    recipe(
        "a range with a sign", "activations", "signed", activations={**WEIGHTS, "method": "UNIFORM", "signed": True}
    ),
    recipe("a sign that is no truth", "activations.signed", activations={**WEIGHTS, "signed": "no"}),
    spec("misspelt field", "weights.nbits", nbits=4),
    spec("no method", "weights.method", method=None),
    spec("misspelt method", "weights.method", "did you mean SYMMETRIC", method="SYMETRIC"),
    spec("40 bits", "weights.n_bits", n_bits=40),
    spec("bool bits", "weights.n_bits", n_bits=True),
    spec("no training method", "weights.training_method", training_method=None),
    spec("empty training method", "weights.training_method", training_method=""),
    spec("two training methods", "weights.training_method", training_method=["LSQ", "STE"]),
    spec("an axis for a truth", "weights.per_channel", per_channel=0),
    spec("a word for a truth", "weights.enabled", enabled="off"),
    spec("negative min_threshold", "weights.min_threshold", min_threshold=-1),
    spec("NaN min_threshold", "weights.min_threshold", min_threshold=NAN),
    spec("no candidates", "weights.candidates", "empty", candidates=[]),
    spec("equal candidates", "weights.candidates", "[2, 2]", candidates=[2, 2]),
    spec("a candidate of no bits", "weights.candidates.1", candidates=[2, 0]),
    spec("arguments are a list", "weights.arguments", arguments=[1]),
    spec("an argument that JSON does not know", "weights.arguments.generator", arguments={"generator": object()}),
    spec("NaN argument", "weights.arguments.cost", "finite", arguments={"cost": NAN}),
    recipe("unknown calibration", "calibration.weights", "'mse'", calibration={"weights": "best"}),
    recipe("no percent", "calibration.percentile", calibration={"percentile": 0}),
    recipe("101 percent", "calibration.percentile", calibration={"percentile": 101}),
    recipe("bool percent", "calibration.percentile", calibration={"percentile": True}),
    recipe("NaN exponent", "calibration.p", calibration={"p": NAN}),
    recipe("negative exponent", "calibration.p", calibration={"p": -1}),
    recipe("rules are a mapping", "rules", "list", rules={"match": {"name": "a"}}),
    rule("without match", "rules.1.match", skip=True),
    rule("an empty match", "rules.1.match", "by name, by op", match={}, skip=True),
    rule("a match that is a word", "rules.1.match", match="head", skip=True),
    rule("misspelt criterion", "rules.1.match.nmae", match={"nmae": "head"}, skip=True),
    rule("unknown op", "rules.1.match.op", "depthwise_conv", match={"op": "convolution"}, skip=True),
    rule("a rule that changes nothing", "rules.1", "changes nothing", match={"name": "head"}),
    rule("empty changes", "rules.1", "changes nothing", match={"name": "head"}, weights={}, activations={}),
    rule("misspelt change", "rules.1.weights.bits", match={"name": "head"}, weights={"bits": 8}),
    rule("40 bits", "rules.1.activations.n_bits", match={"name": "head"}, activations={"n_bits": 40}),
    rule("equal candidates", "rules.1.weights.candidates", match={"name": "a"}, weights={"candidates": [2, 2]}),
    rule("changes are None", "rules.1.weights", match={"name": "head"}, weights=None),
    rule("a word for a truth", "rules.1.skip", match={"name": "head"}, skip="yes"),
)
def test_a_recipe(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


LAYERS = [
    LayerInfo("body.conv", "conv", {"weight": WeightInfo((8, 3, 3, 3), 0)}),
    LayerInfo("act", "activation"),
    LayerInfo("head", "linear", {"weight": WeightInfo((10, 8), 0)}),
]
HEAD = {"match": {"name": "head"}}


def resolve(what: str, error: type[Exception], *facts: str, **fields: Any) -> Row:
    """Return a row of a recipe that doesn't fit the layers."""
    return what, fields, lambda given: QuantizationRecipe.of(given).resolve(LAYERS), error, facts


@table(
    resolve(
        "a rule for an unknown layer",
        RuleError,
        "rules.0",
        "haed",
        "body.conv, act, head",
        weights=WEIGHTS,
        rules=[{"match": {"name": "haed"}, "skip": True}],
    ),
    resolve(
        "a rule for an op that is not there",
        RuleError,
        "rules.0",
        "embedding",
        rules=[{"match": {"op": "embedding"}, "skip": True}],
    ),
    resolve(
        "a rule for a name in other letters",
        RuleError,
        "rules.0",
        "Head",
        rules=[{"match": {"name": "Head"}, "skip": True}],
    ),
    resolve(
        "weights of a layer without",
        RuleError,
        "rules.0",
        "act",
        rules=[{"match": {"op": "activation"}, "weights": {"n_bits": 8}}],
    ),
    resolve(
        "half a spec",
        UnsupportedConfigError,
        "head: weights",
        "method, training_method",
        rules=[{**HEAD, "weights": {"n_bits": 8}}],
    ),
    resolve(
        "half an activation spec",
        UnsupportedConfigError,
        "head: activations",
        "n_bits",
        rules=[{**HEAD, "activations": {"method": "SYMMETRIC", "training_method": "LSQ"}}],
    ),
    resolve(
        "a wide table",
        UnsupportedConfigError,
        "body.conv.weight",
        "mctq",
        weights={**WEIGHTS, "method": "LUT_SYM_QUANTIZER", "n_bits": 9},
    ),
    resolve(
        "a table for activations",
        UnsupportedConfigError,
        "body.conv",
        "LUT_SYM_QUANTIZER",
        activations={**WEIGHTS, "method": "LUT_SYM_QUANTIZER"},
    ),
    resolve(
        "a sign for a range",
        ValidationError,
        "signed",
        activations={**WEIGHTS, "method": "UNIFORM"},
        rules=[{**HEAD, "activations": {"signed": False}}],
    ),
)
def test_a_recipe_for_layers(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("recipe.yaml", b"", "NoneType"),
    "a list": ("recipe.yaml", b"- weights\n- activations\n", "list"),
    "a word": ("recipe.yaml", b"weights", "str"),
    "a JSON list": ("recipe.json", b"[]", "list"),
    "an empty JSON file": ("recipe.json", b"", "not JSON"),
    "broken YAML": ("recipe.yaml", b"weights: {method: [", "not YAML"),
    "broken JSON": ("recipe.json", b'{"weights": {', "not JSON"),
    "YAML in a JSON file": ("recipe.json", b"weights: {n_bits: 4}", "not JSON"),
    "a binary file": ("recipe.yaml", bytes(range(256)), "can't be read"),
    "null characters": ("recipe.yaml", b"weights: \0", "not YAML"),
    "a month that is none": ("recipe.yaml", b"weights: 2024-13-01", "not YAML"),
    "a number of 5000 digits": ("recipe.yaml", b"weights: " + b"9" * 5000, "not YAML"),
    "a JSON number of 5000 digits": ("recipe.json", b'{"weights": ' + b"9" * 5000 + b"}", "not JSON"),
    "a tag without a value": ("recipe.yaml", b'weights: !!int ""', "not YAML"),
    "a Python object": ("recipe.yaml", b"!!python/object/apply:os.getcwd []", "not YAML"),
    "deeply nested JSON": ("recipe.json", b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("name", "content", "problem"), FILES.values(), ids=FILES)
def test_a_file_that_holds_no_recipe(name: str, content: bytes, problem: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content)
    check(path, QuantizationRecipe.of, DocumentError, (str(path), problem))
    assert path.read_bytes() == content


def test_a_file_with_a_wrong_field_names_its_path(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("weights: {method: SYMMETRIC, n_bits: 40, training_method: LSQ}", encoding="utf-8")
    check(path, QuantizationRecipe.of, ValidationError, ("weights.n_bits",))


@pytest.mark.parametrize("name", ["missing.yaml", ".", "missing/recipe.json", "nul\0l", "x" * 5000])
def test_a_path_without_a_recipe(name: str, tmp_path: Path):
    path = tmp_path / name
    check(path, QuantizationRecipe.of, DocumentError, (str(path), "can't be read"))


@pytest.mark.parametrize("source", [None, 5, b"recipe.yaml", ["weights"], QuantizationRecipe])
def test_what_is_neither_recipe_nor_mapping_nor_path(source: Any):
    check(source, QuantizationRecipe.of, DocumentError, (type(source).__name__, "a mapping, or the path"))


# ---- quantizers -----------------------------------------------------------------------------------------------------


def quantizer_row(
    what: str, make: Callable[[], Any], call: Callable[[Any], object], error: type[Exception], *facts: str
) -> Row:
    """Return a row whose subject is made fresh."""
    return what, make(), call, error, facts


def fresh(axis: int | None = None, params: Any = None, shape: tuple[int, ...] = (2, 3)) -> Any:
    """Return an initialized weights quantizer."""
    fields = {} if axis is None else {"weights_channels_axis": axis, "weights_per_channel_threshold": True}
    return weights_quantizer(weights_config({THRESHOLD: 1.0} if params is None else params, **fields), shape)


def bare(axis: int | None = None, params: Any = None) -> Any:
    """Return a weights quantizer without variables."""
    fields = {} if axis is None else {"weights_channels_axis": axis, "weights_per_channel_threshold": True}
    quantizer = HomeWeights(weights_config({} if params is None else params, **fields))
    quantizer.subject = "fc.weight"
    return quantizer


def setting(params: Any) -> Callable[[Any], object]:
    """Return the call that sets quantization params."""
    return lambda quantizer: quantizer.set_quantization_params(params)


def initializing(shape: Any) -> Callable[[Any], object]:
    """Return the call that initializes for a shape."""
    return lambda quantizer: quantizer.initialize_quantization(shape, "weight", None)


@table(
    ("no config", None, HomeWeights, InvalidArgumentError, ("HomeWeights", "NoneType", "WeightsConfig")),
    ("a mapping", {"weights_n_bits": 4}, HomeWeights, InvalidArgumentError, ("HomeWeights", "dict")),
    ("the other target", activation_config(), HomeWeights, UnsupportedConfigError, ("HomeWeights", "Activation")),
    ("the other target's", weights_config(), HomeActivation, UnsupportedConfigError, ("HomeActivation", "Weights")),
    (
        "an unsupported method",
        weights_config(method="LUT_POT_QUANTIZER"),
        HomeWeights,
        UnsupportedConfigError,
        ("LUT_POT_QUANTIZER", *map(str, GRIDS)),
    ),
    (
        "frozen by a word",
        weights_config(),
        lambda config: HomeWeights(config, freeze_quant_params="no"),  # type: ignore[arg-type]
        InvalidArgumentError,
        ("HomeWeights", "freeze_quant_params", "'no'"),
    ),
    quantizer_row(
        "axis beyond the tensor", lambda: bare(2), initializing((2, 3)), ShapeMismatchError, "channels_axis", "2"
    ),
    quantizer_row(
        "axis before the tensor", lambda: bare(-3), initializing((2, 3)), ShapeMismatchError, "channels_axis", "-3"
    ),
    quantizer_row("an axis of no shape", lambda: bare(0), initializing(None), ShapeMismatchError, "channels_axis"),
    quantizer_row("an axis of a scalar", lambda: bare(0), initializing(()), ShapeMismatchError, "channels_axis"),
    quantizer_row(
        "one channel too many",
        lambda: bare(0, {THRESHOLD: [1.0] * 3}),
        initializing((2, 3)),
        ShapeMismatchError,
        "threshold",
        "3",
    ),
    quantizer_row(
        "one channel too few",
        lambda: bare(1, {THRESHOLD: [1.0] * 2}),
        initializing((2, 3)),
        ShapeMismatchError,
        "threshold",
        "2",
    ),
    quantizer_row(
        "a shape that is a number", bare, initializing(5), ShapeMismatchError, "fc.weight", "tensor_shape", "5"
    ),
    quantizer_row("a shape that is a word", bare, initializing("ab"), ShapeMismatchError, "fc.weight", "tensor_shape"),
    quantizer_row("a fractional shape", bare, initializing((2.5,)), ShapeMismatchError, "fc.weight", "tensor_shape"),
    quantizer_row(
        "initialized for another shape",
        lambda: fresh(0),
        initializing((3, 3)),
        QuantizerStateError,
        "fc.weight",
        "another shape",
    ),
    quantizer_row("no params", fresh, setting(None), InvalidArgumentError, "fc.weight", "None"),
    quantizer_row("params of another width", fresh, setting({8: {THRESHOLD: 2.0}}), InvalidArgumentError, "[8]", "[4]"),
    quantizer_row(
        "params of one width more", fresh, setting({4: {THRESHOLD: 2.0}, "a": {}}), InvalidArgumentError, "'a'"
    ),
    quantizer_row("params that are none", fresh, setting({4: None}), InvalidArgumentError, "fc.weight", "mapping"),
    quantizer_row("params that are a list", fresh, setting({4: [2.0]}), InvalidArgumentError, "fc.weight", "mapping"),
    quantizer_row("empty params", fresh, setting({4: {}}), InvalidArgumentError, "fc.weight", "width 4"),
    quantizer_row("only a sign", fresh, setting({4: {SIGNED: True}}), InvalidArgumentError, "fc.weight", "'threshold'"),
    quantizer_row(
        "NaN threshold set", fresh, setting({4: {THRESHOLD: NAN}}), InvalidArgumentError, "fc.weight", "'threshold'"
    ),
    quantizer_row(
        "a misspelt key set", fresh, setting({4: {"treshold": 1.0}}), InvalidArgumentError, "did you mean 'threshold'"
    ),
    quantizer_row(
        "one channel too many set",
        lambda: fresh(0),
        setting({4: {THRESHOLD: [1.0] * 3}}),
        ShapeMismatchError,
        "fc.weight: threshold",
        "(3,)",
    ),
    quantizer_row(
        "channels for a tensor", fresh, setting({4: {THRESHOLD: [1.0] * 2}}), ShapeMismatchError, "fc.weight: threshold"
    ),
    quantizer_row(
        "set before initialization",
        bare,
        setting({4: {THRESHOLD: 1.0}}),
        QuantizerStateError,
        "initialize_quantization",
    ),
    quantizer_row(
        "two signs",
        lambda: activation_quantizer(activation_config(activation_quantization_candidates=candidates(2, 4))),
        setting({2: {THRESHOLD: 1.0, SIGNED: True}, 4: {THRESHOLD: 1.0, SIGNED: False}}),
        InvalidArgumentError,
        "fc: input",
        "'is_signed'",
    ),
    quantizer_row(
        "a variable by a wrong name",
        fresh,
        lambda quantizer: quantizer.get_quantizer_variable("treshold"),
        QuantizerStateError,
        "'treshold'",
        "did you mean 'threshold'",
    ),
    quantizer_row(
        "a variable by no name",
        fresh,
        lambda quantizer: quantizer.get_quantizer_variable([]),
        QuantizerStateError,
        "threshold",
    ),
    quantizer_row(
        "numbers before calibration",
        lambda: fresh(params={}),
        lambda q: q.current_qparams(),
        QuantizerStateError,
        "fc.weight",
    ),
    quantizer_row(
        "a config before calibration",
        lambda: fresh(params={}),
        lambda q: q.current_config(),
        QuantizerStateError,
        "fc.weight",
    ),
    quantizer_row(
        "deployed before initialization", bare, lambda q: q.convert2inferable(), QuantizerStateError, "not initialized"
    ),
)
def test_a_quantizer(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


def document(**changes: Any) -> dict[str, Any]:
    """Return a quantizer's document with some parts changed."""
    return {**fresh(0, {THRESHOLD: [1.0, 2.0]}).get_config(), **changes}


def nested(**changes: Any) -> dict[str, Any]:
    """Return a quantizer's document with changes in its config."""
    whole = document()
    return {**whole, "quantization_config": {**whole["quantization_config"], **changes}}


def restored(what: str, given: Any, error: type[Exception], *facts: str) -> Row:
    """Return a row of a quantizer's document."""
    return what, given, HomeWeights.from_config, error, facts


@table(
    restored("nothing", None, InvalidArgumentError, "HomeWeights.from_config", "None"),
    restored("a list", [1], InvalidArgumentError, "HomeWeights.from_config", "list"),
    restored("an empty mapping", {}, InvalidArgumentError, "quantization_config"),
    restored("a config that is none", document(quantization_config=None), InvalidArgumentError, "quantization_config"),
    restored("an unknown target", nested(target="bias"), InvalidArgumentError, "target", "'bias'"),
    restored("a target that is a list", nested(target=[]), InvalidArgumentError, "target", "[]"),
    restored(
        "the other target", activation_quantizer(activation_config()).get_config(), UnsupportedConfigError, "Activation"
    ),
    restored("a wrong field", nested(weights_n_bits=40), ValidationError, "weights_n_bits"),
    restored("an unknown field", nested(weights_bits=4), ValidationError, "weights_bits"),
    restored("another version", nested(schema_version=9), ValidationError, "schema_version"),
    restored("arguments that are none", document(arguments=None), InvalidArgumentError, "arguments"),
    restored("an unknown argument", document(arguments={"heat": 1}), InvalidArgumentError, "arguments", "heat"),
    restored("frozen by a number", document(freeze_quant_params=1), InvalidArgumentError, "freeze_quant_params"),
    restored("signed by a word", document(signed="yes"), InvalidArgumentError, "signed", "'yes'"),
    restored("dimensions that are a word", document(tensor_ndim="two"), InvalidArgumentError, "tensor_ndim", "'two'"),
    restored("negative dimensions", document(tensor_ndim=-1), InvalidArgumentError, "tensor_ndim", "-1"),
    restored("a million dimensions", document(tensor_ndim=10**6), InvalidArgumentError, "tensor_ndim"),
    restored("an axis beyond the dimensions", document(tensor_ndim=0), ShapeMismatchError, "weights_channels_axis"),
    restored("variables that are a list", document(variables=[1.0]), InvalidArgumentError, "variables"),
    restored(
        "a variable that is a word", document(variables={THRESHOLD: "x"}), InvalidArgumentError, "variables.threshold"
    ),
    restored(
        "an unknown variable", document(variables={"scale": [1.0, 2.0]}), InvalidArgumentError, "threshold", "scale"
    ),
    restored(
        "one variable more", document(variables={THRESHOLD: [1.0, 2.0], "scale": 1.0}), InvalidArgumentError, "scale"
    ),
    restored("a matrix", document(variables={THRESHOLD: [[1.0, 2.0]]}), ShapeMismatchError, "threshold", "(1, 2)"),
    restored("one channel too many", document(variables={THRESHOLD: [1.0] * 3}), ShapeMismatchError, "threshold"),
)
def test_a_quantizers_document(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


# ---- calibration ----------------------------------------------------------------------------------------------------


def seen(*values: float) -> Observer:
    """Return an observer that has seen values."""
    observer = Observer()
    observer.update(values)
    return observer


def activation_call(what: str, error: type[Exception], *facts: str, observer: Any = None, **changes: Any) -> Row:
    """Return a row of `calibrate_activation`."""
    arguments = {"calibration_method": "mse", "quantization_method": "UNIFORM", "n_bits": 4, **changes}
    subject = seen(-1.0, 2.0) if observer is None else observer
    return what, subject, lambda given: calibrate_activation(given, **arguments), error, facts


def weights_call(what: str, values: Any, error: type[Exception], *facts: str, **changes: Any) -> Row:
    """Return a row of `calibrate_weights`."""
    arguments = {"calibration_method": "mse", "quantization_method": "UNIFORM", "n_bits": 4, **changes}
    return what, values, lambda given: calibrate_weights(given, **arguments), error, facts


ONES = np.ones((2, 3), np.float32)


@table(
    ("a NaN", seen(1.0), lambda o: o.update([NAN]), CalibrationError, ("1 NaN",)),
    ("an infinity", seen(1.0), lambda o: o.update([INF, 1.0]), CalibrationError, ("1 infinite",)),
    ("text", seen(1.0), lambda o: o.update(["a"]), CalibrationError, ("dtype",)),
    ("complex numbers", seen(1.0), lambda o: o.update([1j]), CalibrationError, ("dtype",)),
    ("other bins", seen(1.0), lambda o: o.merge(Observer(16)), CalibrationError, ("16",)),
    ("a state of nothing", None, lambda _: Observer.from_state({}), CalibrationError, ("counts",)),
    ("one bin", 1, Observer, InvalidArgumentError, ("n_bins", "1")),
    ("bool bins", True, Observer, InvalidArgumentError, ("n_bins", "True")),
    activation_call("no observer", CalibrationError, "observer", observer="none"),
    activation_call("an observer of nothing", CalibrationError, "no values", observer=Observer()),
    activation_call(
        "unknown calibration method", InvalidArgumentError, "calibration_method", calibration_method="best"
    ),
    activation_call("unknown method", InvalidArgumentError, "quantization_method", quantization_method="LOG"),
    activation_call("a table", UnsupportedConfigError, "quantization_method", quantization_method="LUT_POT_QUANTIZER"),
    activation_call("no bits", InvalidArgumentError, "n_bits", n_bits=0),
    activation_call("40 bits", InvalidArgumentError, "n_bits", "16", n_bits=40),
    activation_call("bool bits", InvalidArgumentError, "n_bits", n_bits=True),
    activation_call("float bits", InvalidArgumentError, "n_bits", n_bits=4.0),
    activation_call("a sign that is no truth", InvalidArgumentError, "signed", signed="yes"),
    activation_call("negative min_threshold", InvalidArgumentError, "min_threshold", min_threshold=-1.0),
    activation_call("NaN min_threshold", InvalidArgumentError, "min_threshold", min_threshold=NAN),
    activation_call("no percent", InvalidArgumentError, "percentile", percentile=0),
    activation_call("NaN percent", InvalidArgumentError, "percentile", percentile=NAN),
    activation_call("exponent 0", InvalidArgumentError, "p must be", p=0),
    weights_call("NaN weights", np.array([NAN, 1.0]), CalibrationError, "1 NaN"),
    weights_call("no weights", np.zeros((0, 3)), CalibrationError, "(0, 3)"),
    weights_call("text weights", np.array(["a"]), CalibrationError, "dtype"),
    weights_call("axis out of range", ONES, InvalidArgumentError, "channels_axis", "(2, 3)", channels_axis=2),
    weights_call("bool axis", ONES, InvalidArgumentError, "channels_axis", channels_axis=True),
    weights_call("40 bits for weights", ONES, InvalidArgumentError, "n_bits", n_bits=40),
)
def test_calibration(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


# ---- lookups, plugins, schedules ------------------------------------------------------------------------------------


def lookup(what: str, key: tuple[Any, ...], error: type[Exception], *facts: str) -> Row:
    """Return a row of a quantizer's lookup."""
    return what, key, lambda given: get_trainable_quantizer_class(*given), error, facts


@table(
    lookup("unknown target", ("Weigths", "LSQ", "UNIFORM"), InvalidArgumentError, "quant_target", "mean 'Weights'"),
    lookup("no target", (None, "LSQ", "UNIFORM"), InvalidArgumentError, "quant_target", "Activation, Weights"),
    lookup("unknown method", ("Weights", "LSQ", "UNIFROM"), InvalidArgumentError, "quant_method", "mean 'UNIFORM'"),
    lookup("foreign method", ("Weights", "LSQ", Foreign.LOGARITHMIC), InvalidArgumentError, "quant_method", "UNIFORM"),
    lookup("unknown backend", ("Weights", "LSQ", "UNIFORM", "nowhere"), UnknownBackendError, "'nowhere'"),
    lookup("no backend", ("Weights", "LSQ", "UNIFORM", None), UnknownBackendError, "None"),
    lookup("a list of backends", ("Weights", "LSQ", "UNIFORM", ["torch"]), UnknownBackendError, "['torch']"),
    ("quantizers of nowhere", "nowhere", list_quantizers, UnknownBackendError, ("'nowhere'",)),
    ("a backend of nowhere", "nowhere", get_backend, UnknownBackendError, ("'nowhere'", "keras, tf_keras, torch")),
    ("a plugin without hooks", object(), lambda plugin: register(plugin, "mine"), PluginError, ("'mine'", "hook")),
)
def test_a_lookup(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


def schedule(what: str, *facts: str, **changes: Any) -> Row:
    """Return a row of an annealing schedule."""
    fields = {"t_start": 0, "t_end": 10, "initial_val": 1.0, "target_val": 0.0, **changes}
    return what, fields, lambda given: LinearAnnealingScheduler(**given), InvalidArgumentError, facts


@table(
    schedule("no steps", "t_end must be greater than t_start", t_start=10, t_end=10),
    schedule("backwards", "t_end must be greater than t_start", t_start=10, t_end=4),
    schedule("before the first step", "t_start must not be negative", t_start=-1),
    schedule("NaN end", "t_end", "finite", t_end=NAN),
    schedule("endless", "t_end", "finite", t_end=INF),
    schedule("a word", "t_start", "'soon'", t_start="soon"),
    schedule("bool step", "t_start", "True", t_start=True),
    schedule("NaN value", "initial_val", "finite", initial_val=NAN),
    schedule("no target", "target_val", "None", target_val=None),
    ("a field is missing", {"t_start": 0}, LinearAnnealingScheduler.from_dict, InvalidArgumentError, ("t_end",)),
    (
        "a field too many",
        {"t_start": 0, "t_end": 1, "initial_val": 1, "target_val": 0, "target_value": 0},
        LinearAnnealingScheduler.from_dict,
        InvalidArgumentError,
        ("'target_value'", "did you mean 'target_val'"),
    ),
    (
        "a step that is a word",
        "x",
        LinearAnnealingScheduler(0, 1, 1.0, 0.0),
        InvalidArgumentError,
        ("t must be", "'x'"),
    ),
    (
        "a step that is NaN",
        NAN,
        LinearAnnealingScheduler(0, 1, 1.0, 0.0),
        InvalidArgumentError,
        ("t must not be NaN",),
    ),
)
def test_a_schedule(subject: Any, call: Any, error: Any, facts: Any):
    check(subject, call, error, facts)


# ---- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["lst"], ["lst", "list", "doctor"]),
        ([], ["command"]),
        (["list", "--bakend", "torch"], ["--bakend"]),
        (["list", "torch"], ["torch"]),
        (["list", "--backend", "nowhere"], ["'nowhere'", "keras, tf_keras, torch"]),
        (["schema", "--output", "missing/schemas.json"], ["schemas.json", "can't be written"]),
        (["schema", "--output", "."], ["can't be written"]),
    ],
    ids=" ".join,
)
def test_the_command_line(
    arguments: list[str],
    facts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = cli.main(arguments)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert [fact for fact in facts if fact not in err] == []
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
