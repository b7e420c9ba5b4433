"""What a quantizer class must look like, and what all of them share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

import trainable_core
from trainable_core.config import (
    TrainableQuantizerActivationConfig,
    TrainableQuantizerCandidateConfig,
    TrainableQuantizerWeightsConfig,
)
from trainable_core.constants import RANGE_MAX, RANGE_MIN, SIGNED, THRESHOLD
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TrainingMethod, VariableGroup
from trainable_core.errors import (
    InvalidArgumentError,
    QuantizerDefinitionError,
    QuantizerStateError,
    ShapeMismatchError,
    UnsupportedConfigError,
)
from trainable_core.key import Key, identifier_text
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.registry.marks import keys_of

SOURCES = Path(trainable_core.__file__).parents[1]


class ForeignTarget(Enum):
    """Looks like ``mct_quantizers.QuantizationTarget``."""

    Weights = "Weights"
    Bias = "Bias"


class ForeignMethod(Enum):
    """Looks like ``mct_quantizers.QuantizationMethod``, with other values."""

    SYMMETRIC = "s"
    UNIFORM = "u"
    LOGARITHMIC = "l"


def marked(**marks: Any) -> type[BaseTrainableQuantizer]:
    """Return a quantizer class, well marked unless `marks` say otherwise."""
    well = {
        "backend": "home",
        "quantization_target": QuantizationTarget.Weights,
        "quantization_method": [QuantizationMethod.SYMMETRIC],
        "identifier": TrainingMethod.LSQ,
    }
    return type("Quantizer", (BaseTrainableQuantizer,), {**well, **marks})


class WeightsQuantizer(BaseTrainableQuantizer):
    """The smallest quantizer there can be: its variables are NumPy arrays, and all of them are trained."""

    backend = "home"
    quantization_target = QuantizationTarget.Weights
    quantization_method: ClassVar[Any] = (QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO)
    identifier: ClassVar[Any] = "PLAIN"

    def add_quantizer_variable(
        self,
        name: str,
        variable: Any,
        group: VariableGroup = VariableGroup.QPARAMS,
        *,
        trained: bool | None = None,
    ) -> None:
        """Own an array."""
        self._variable_groups[name] = group
        setattr(self, name, np.array(variable, np.float32))

    def get_trainable_variables(self, group: VariableGroup) -> Sequence[Any]:
        """Return the arrays of one group."""
        return [getattr(self, name) for name, own in self._variable_groups.items() if own is group]

    def to_numpy(self, variable: Any) -> NDArray[Any]:
        """Return a copy."""
        return np.array(variable)

    def assign(self, variable: Any, value: NDArray[Any]) -> None:
        """Write into the array."""
        variable[...] = value

    def convert2inferable(self) -> Any:
        """Deploy nothing."""
        raise NotImplementedError


class ActivationQuantizer(WeightsQuantizer):
    """The same for activations."""

    quantization_target = QuantizationTarget.Activation
    identifier = TrainingMethod.STE


class UniformQuantizer(WeightsQuantizer):
    """Ranges instead of thresholds."""

    quantization_method = (QuantizationMethod.UNIFORM,)


class UniformActivationQuantizer(ActivationQuantizer):
    """Ranges for activations."""

    quantization_method = (QuantizationMethod.UNIFORM,)


class ChoosingQuantizer(WeightsQuantizer):
    """A grid per candidate, of which the last is deployed, and an argument of its own."""

    def __init__(
        self,
        quantization_config: TrainableQuantizerWeightsConfig,
        freeze_quant_params: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(quantization_config, freeze_quant_params)
        self.temperature = temperature

    @property
    def widths(self) -> tuple[int, ...]:
        """Bit widths of the candidates."""
        return tuple(candidate.n_bits for candidate in self.quantization_config.candidates or [])

    @property
    def selected_width(self) -> int:
        """The last candidate's."""
        return self.widths[-1]

    def add_variables(self) -> None:
        """Add one weight per candidate."""
        self.add_quantizer_variable("attention", np.arange(len(self.widths)))

    def get_arguments(self) -> dict[str, Any]:
        """Return the argument of its own."""
        return {"temperature": self.temperature}


def weights_config(
    method: QuantizationMethod = QuantizationMethod.SYMMETRIC, params: dict[str, Any] | None = None, **fields: Any
) -> TrainableQuantizerWeightsConfig:
    """Return a 4-bit weights config; without params it is not calibrated."""
    return TrainableQuantizerWeightsConfig(
        weights_quantization_method=method, weights_n_bits=4, weights_quantization_params=params or {}, **fields
    )


def per_channel(params: dict[str, Any] | None = None, axis: int = 0) -> TrainableQuantizerWeightsConfig:
    """Return a weights config with a threshold per channel."""
    return weights_config(params=params, weights_channels_axis=axis, weights_per_channel_threshold=True)


def activation_config(
    params: dict[str, Any] | None = None, method: QuantizationMethod = QuantizationMethod.SYMMETRIC
) -> TrainableQuantizerActivationConfig:
    """Return a 4-bit activation config; without params it is not calibrated."""
    return TrainableQuantizerActivationConfig(
        activation_quantization_method=method,
        activation_n_bits=4,
        activation_quantization_params=params or {},
    )


def choosing_config() -> TrainableQuantizerWeightsConfig:
    """Return a config with candidates of 2 and 8 bits; one has params of its own."""
    candidates = [
        TrainableQuantizerCandidateConfig(n_bits=2, quantization_params={THRESHOLD: 0.5}),
        TrainableQuantizerCandidateConfig(n_bits=8),
    ]
    return weights_config(params={THRESHOLD: 3.0}, weights_quantization_candidates=candidates)


def initialized(
    config: TrainableQuantizerWeightsConfig, shape: tuple[int, ...] = (2, 3), cls: type[Any] = WeightsQuantizer
) -> Any:
    """Return a quantizer with its variables."""
    quantizer = cls(config)
    quantizer.initialize_quantization(shape, "weight", None)
    return quantizer


def initialized_activation(params: dict[str, Any]) -> ActivationQuantizer:
    """Return an activation quantizer with its variables."""
    quantizer = ActivationQuantizer(activation_config(params))
    quantizer.initialize_quantization(None, "relu", None)
    return quantizer


# --- Keys


def test_a_key_reads_as_a_path() -> None:
    key = Key("torch", QuantizationTarget.Weights, "LSQ", QuantizationMethod.LUT_POT_QUANTIZER)
    assert str(key) == "torch/Weights/LSQ/LUT_POT_QUANTIZER"


def test_a_class_has_a_key_per_quantization_method() -> None:
    methods = [QuantizationMethod.SYMMETRIC, QuantizationMethod.UNIFORM]
    assert keys_of(marked(quantization_method=methods), "home") == [
        Key("home", QuantizationTarget.Weights, "LSQ", method) for method in methods
    ]


def test_foreign_members_are_read_by_name() -> None:
    cls = marked(quantization_target=ForeignTarget.Weights, quantization_method=[ForeignMethod.UNIFORM])
    assert keys_of(cls, "home") == [Key("home", QuantizationTarget.Weights, "LSQ", QuantizationMethod.UNIFORM)]


class AncestorTrainingMethod(Enum):
    """Looks like the ancestor's, whose values are tuples by accident."""

    STE = ("STE",)


@pytest.mark.parametrize(
    ("identifier", "text"),
    [(TrainingMethod.DQA, "DQA"), (AncestorTrainingMethod.STE, "STE"), ("EWGS", "EWGS"), (7, "7")],
)
def test_an_identifier_is_its_members_name_or_its_own_text(identifier: object, text: str) -> None:
    assert identifier_text(identifier) == text


class NeedsMore(WeightsQuantizer):
    """A second argument without default."""

    def __init__(self, quantization_config: TrainableQuantizerWeightsConfig, temperature: float) -> None:
        raise NotImplementedError


class TakesNoConfig(WeightsQuantizer):
    """Keyword arguments only."""

    def __init__(self, *, temperature: float = 1.0) -> None:
        raise NotImplementedError


class TakesNothing(WeightsQuantizer):
    """No argument at all."""

    def __init__(self) -> None:
        raise NotImplementedError


class TakesMore(WeightsQuantizer):
    """Further arguments that all may be left out."""

    def __init__(
        self, config: TrainableQuantizerWeightsConfig, temperature: float = 1.0, *rest: Any, **names: Any
    ) -> None:
        raise NotImplementedError


class NoQuantizer:
    """Marked, but without a quantizer's methods."""

    quantization_target = QuantizationTarget.Weights
    quantization_method = (QuantizationMethod.SYMMETRIC,)
    identifier = "LSQ"


class NoConversion(NoQuantizer):
    """Marked, but can't be deployed."""

    def initialize_quantization(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Make no variables."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (marked(quantization_target=None, quantization_method=None), "not marked"),
        (marked(quantization_target=None), "no quantization_target"),
        (marked(quantization_method=[]), "no quantization_method"),
        (marked(quantization_method=None), "no quantization_method"),
        (marked(identifier=None), "no identifier"),
        (marked(quantization_target=ForeignTarget.Bias), "Bias"),
        (marked(quantization_target="Weights"), "Weights"),
        (marked(quantization_method=[ForeignMethod.LOGARITHMIC]), "LOGARITHMIC"),
        (marked(quantization_method=QuantizationMethod.SYMMETRIC), "SYMMETRIC"),
        (NeedsMore, "'temperature' has no default"),
        (TakesNoConfig, "first argument must be the config"),
        (TakesNothing, "first argument must be the config"),
        (NoQuantizer, "'initialize_quantization'"),
        (NoConversion, "'convert2inferable'"),
        ("LSQ", "not a class"),
    ],
)
def test_a_class_that_can_not_be_looked_up_or_built_is_refused(cls: Any, problem: str) -> None:
    with pytest.raises(QuantizerDefinitionError, match=problem) as caught:
        keys_of(cls, "home")
    assert caught.value.cls is cls


def test_further_arguments_with_defaults_are_allowed() -> None:
    assert len(keys_of(TakesMore, "home")) == 2


MARKED_BY_MCTQ = """
from mct_quantizers import QuantizationMethod, QuantizationTarget, mark_quantizer
from trainable_core.registry.marks import keys_of
from trainable_core.quantizer import BaseTrainableQuantizer

@mark_quantizer(
    quantization_target=QuantizationTarget.Activation, quantization_method=list(QuantizationMethod), identifier="ALL"
)
class Everything(BaseTrainableQuantizer):
    pass

print("KEYS", *keys_of(Everything, "home"))
"""


@pytest.mark.skipif(importlib.util.find_spec("mct_quantizers") is None, reason="mct-quantizers is not installed")
def test_every_method_of_mctq_has_its_namesake() -> None:
    # In a process of its own: importing mct_quantizers imports every framework there is.
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MARKED_BY_MCTQ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    keys = finished.stdout.partition("KEYS")[2].split()
    assert sorted(keys) == sorted(f"home/Activation/ALL/{method.name}" for method in QuantizationMethod)


# --- What all quantizers share


def test_a_quantizer_keeps_its_config() -> None:
    config = weights_config()
    assert WeightsQuantizer(config).quantization_config is config


@pytest.mark.parametrize("frozen", [False, True])
def test_a_quantizer_knows_whether_its_parameters_are_frozen(*, frozen: bool) -> None:
    assert WeightsQuantizer(weights_config(), freeze_quant_params=frozen).freeze_quant_params is frozen


def test_parameters_are_not_frozen_unless_asked() -> None:
    assert WeightsQuantizer(weights_config()).freeze_quant_params is False


@pytest.mark.parametrize(
    ("quantizer", "weights"),
    [(WeightsQuantizer(weights_config()), True), (ActivationQuantizer(activation_config()), False)],
)
def test_a_quantizer_is_for_weights_or_for_activations(quantizer: BaseTrainableQuantizer, *, weights: bool) -> None:
    assert quantizer.weights_quantization() is weights
    assert quantizer.activation_quantization() is not weights


@pytest.mark.parametrize(
    ("quantizer", "name"),
    [(WeightsQuantizer(weights_config()), "PLAIN"), (ActivationQuantizer(activation_config()), "STE")],
)
def test_a_quantizer_names_its_training_method(quantizer: BaseTrainableQuantizer, name: str) -> None:
    assert quantizer.training_method == name


def test_a_config_for_the_other_target_is_refused() -> None:
    with pytest.raises(UnsupportedConfigError, match=r"Weights.*Activation"):
        WeightsQuantizer(activation_config())


def test_a_config_for_another_grid_is_refused_with_the_grids_there_are() -> None:
    with pytest.raises(UnsupportedConfigError, match=r"UNIFORM.*SYMMETRIC, POWER_OF_TWO"):
        WeightsQuantizer(weights_config(QuantizationMethod.UNIFORM))


@pytest.mark.parametrize("config", [None, {"weights_n_bits": 4}, WeightsQuantizer])
def test_what_is_not_a_config_is_refused(config: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="TrainableQuantizerWeightsConfig"):
        WeightsQuantizer(config)


def test_a_class_that_is_not_marked_can_not_be_built() -> None:
    class Unmarked(WeightsQuantizer):
        quantization_target = None
        quantization_method = None

    with pytest.raises(QuantizerDefinitionError, match="Unmarked"):
        Unmarked(weights_config())


def test_a_class_without_an_identifier_can_be_built_and_not_looked_up() -> None:
    class Nameless(WeightsQuantizer):
        identifier = None

    assert Nameless(weights_config()).training_method == "Nameless"
    with pytest.raises(QuantizerDefinitionError, match="its mark has no identifier"):
        keys_of(Nameless, "home")


def test_quantizer_parameters_show_variables_and_groups() -> None:
    quantizer = WeightsQuantizer(weights_config())
    assert quantizer.quantizer_parameters == {}
    quantizer.initialize_quantization((2, 3), "weight", None)
    told = quantizer.quantizer_parameters
    assert list(told) == [THRESHOLD]
    assert told[THRESHOLD]["var"] is quantizer.get_quantizer_variable(THRESHOLD)
    assert told[THRESHOLD]["group"] is VariableGroup.QPARAMS
    with pytest.raises(TypeError):
        told[THRESHOLD] = {}  # type: ignore[index] # what is being tested


def test_a_variable_is_found_by_its_name() -> None:
    quantizer = WeightsQuantizer(weights_config())
    quantizer.add_quantizer_variable("threshold", 2.0)
    assert quantizer.get_quantizer_variable("threshold") == 2.0


def test_variables_are_named_in_the_order_they_were_added() -> None:
    quantizer = WeightsQuantizer(weights_config())
    for name in ("threshold", "offset", "alpha"):
        quantizer.add_quantizer_variable(name, 0.0)
    assert quantizer.variable_names == ("threshold", "offset", "alpha")


def test_an_unknown_variable_names_the_nearest_and_all_others() -> None:
    quantizer = WeightsQuantizer(weights_config())
    quantizer.add_quantizer_variable("threshold", 2.0)
    quantizer.add_quantizer_variable("zero", 0.0)
    with pytest.raises(QuantizerStateError, match=r"threshold, zero\nHint: did you mean 'threshold'"):
        quantizer.get_quantizer_variable("treshold")


def test_before_initialization_an_unknown_variable_says_why() -> None:
    with pytest.raises(QuantizerStateError, match="initialize_quantization was not called"):
        WeightsQuantizer(weights_config()).get_quantizer_variable("threshold")


def test_an_attribute_that_is_no_variable_is_not_given_as_one() -> None:
    with pytest.raises(QuantizerStateError, match="no variable 'quantization_config'"):
        WeightsQuantizer(weights_config()).get_quantizer_variable("quantization_config")


# --- Variables


def test_a_tensor_has_one_threshold() -> None:
    variables = WeightsQuantizer(weights_config(params={THRESHOLD: 2.0})).initialize_quantization((2, 3), "w", None)
    assert {name: value.tolist() for name, value in variables.items()} == {THRESHOLD: 2.0}


def test_a_range_has_two_ends() -> None:
    config = weights_config(QuantizationMethod.UNIFORM, {RANGE_MIN: -1.0, RANGE_MAX: 3.0})
    variables = UniformQuantizer(config).initialize_quantization((2, 3), "w", None)
    assert {name: value.tolist() for name, value in variables.items()} == {RANGE_MIN: -1.0, RANGE_MAX: 3.0}


@pytest.mark.parametrize(("axis", "given", "held"), [(1, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), (-2, 4.0, [4.0, 4.0])])
def test_a_channel_has_its_own_threshold(axis: int, given: Any, held: list[float]) -> None:
    quantizer = initialized(per_channel({THRESHOLD: given}, axis))
    assert quantizer.get_quantizer_variable(THRESHOLD).tolist() == held


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_outside_the_tensor_is_refused(axis: int) -> None:
    quantizer = WeightsQuantizer(per_channel(axis=axis))
    with pytest.raises(ShapeMismatchError, match=r"'conv'.*\(2, 3\)"):
        quantizer.initialize_quantization((2, 3), "conv", None)
    assert quantizer.variable_names == ()


def test_params_for_another_number_of_channels_are_refused() -> None:
    quantizer = WeightsQuantizer(per_channel({THRESHOLD: [1.0, 2.0]}, axis=1))
    with pytest.raises(ShapeMismatchError, match=r"'conv'.*threshold.*3 values.*got 2"):
        quantizer.initialize_quantization((2, 3), "conv", None)
    assert quantizer.variable_names == ()


def test_initializing_again_for_the_same_shape_keeps_the_variables() -> None:
    quantizer = initialized(per_channel({THRESHOLD: [1.0, 2.0]}))
    before = quantizer.get_quantizer_variable(THRESHOLD)
    assert quantizer.initialize_quantization((2, 3), "w", None)[THRESHOLD] is before


def test_initializing_again_for_another_shape_is_refused() -> None:
    quantizer = initialized(per_channel({THRESHOLD: 1.0}))
    with pytest.raises(QuantizerStateError, match="'conv'"):
        quantizer.initialize_quantization((4, 3), "conv", None)


def test_an_activation_needs_no_shape() -> None:
    quantizer = ActivationQuantizer(activation_config({THRESHOLD: 2.0}))
    assert quantizer.initialize_quantization(None, "relu", None)[THRESHOLD].shape == ()


def test_candidates_have_their_own_grids() -> None:
    quantizer = initialized(choosing_config(), cls=ChoosingQuantizer)
    assert quantizer.variable_names == ("threshold_2", "threshold_8", "attention")
    assert [quantizer.grid_variables(width)[THRESHOLD].item() for width in (2, 8)] == [0.5, 3.0]


# --- Calibration


def test_without_params_a_quantizer_is_not_calibrated() -> None:
    quantizer = initialized(weights_config())
    assert not quantizer.calibrated
    with pytest.raises(QuantizerStateError, match="no quantization params"):
        quantizer.current_qparams()


def test_a_quantizer_that_was_not_initialized_says_so() -> None:
    with pytest.raises(QuantizerStateError, match="not initialized"):
        WeightsQuantizer(weights_config(params={THRESHOLD: 1.0})).require_calibrated()


def test_params_in_the_config_calibrate() -> None:
    assert initialized(weights_config(params={THRESHOLD: 1.0})).calibrated


def test_params_calibrate_later() -> None:
    quantizer = initialized(weights_config())
    quantizer.set_quantization_params({4: {THRESHOLD: 2.0}})
    qparams = quantizer.current_qparams()
    # 4 bits, signed: 2 / 2**3
    assert (float(qparams.scale), qparams.quant_min, qparams.quant_max) == (0.25, -8, 7)


def test_calibration_decides_the_sign_of_an_activation() -> None:
    quantizer = initialized_activation({})
    quantizer.set_quantization_params({4: {THRESHOLD: 2.0, SIGNED: False}})
    qparams = quantizer.current_qparams()
    # 4 bits, unsigned: 2 / 2**4
    assert (float(qparams.scale), qparams.quant_min, qparams.quant_max) == (0.125, 0, 15)


def test_params_before_initialization_are_refused() -> None:
    with pytest.raises(QuantizerStateError, match="initialize_quantization"):
        WeightsQuantizer(weights_config()).set_quantization_params({4: {THRESHOLD: 2.0}})


@pytest.mark.parametrize(
    ("params", "fact"),
    [
        ({4: {THRESHOLD: -1.0}}, "positive"),
        ({4: {"treshold": 1.0}}, "threshold"),
        ({4: {}}, "width 4"),
        ({8: {THRESHOLD: 1.0}}, r"\[8\].*\[4\]"),
    ],
)
def test_wrong_params_are_refused_and_change_nothing(params: dict[int, dict[str, Any]], fact: str) -> None:
    quantizer = initialized(weights_config(params={THRESHOLD: 2.0}))
    with pytest.raises(InvalidArgumentError, match=fact):
        quantizer.set_quantization_params(params)
    assert quantizer.get_quantizer_variable(THRESHOLD) == 2.0


def test_params_of_another_shape_are_refused_and_change_nothing() -> None:
    quantizer = initialized(per_channel({THRESHOLD: [1.0, 2.0]}))
    with pytest.raises(ShapeMismatchError, match=r"threshold.*\(2,\).*\(3,\)"):
        quantizer.set_quantization_params({4: {THRESHOLD: [5.0, 5.0, 5.0]}})
    assert quantizer.get_quantizer_variable(THRESHOLD).tolist() == [1.0, 2.0]


def test_params_that_are_wrong_for_one_candidate_change_none() -> None:
    quantizer = initialized(choosing_config(), cls=ChoosingQuantizer)
    with pytest.raises(InvalidArgumentError, match="positive"):
        quantizer.set_quantization_params({2: {THRESHOLD: 1.0}, 8: {THRESHOLD: 0.0}})
    assert quantizer.get_quantizer_variable("threshold_2") == 0.5


def test_the_selected_width_is_the_one_deployed() -> None:
    quantizer = initialized(choosing_config(), cls=ChoosingQuantizer)
    assert quantizer.current_qparams().quant_max == 127
    assert quantizer.current_qparams(2).quant_max == 1


def test_the_current_config_holds_the_trained_numbers() -> None:
    quantizer = initialized(choosing_config(), cls=ChoosingQuantizer)
    quantizer.assign(quantizer.get_quantizer_variable("threshold_8"), np.asarray(1.5))
    config = quantizer.current_config()
    assert (config.n_bits, config.quantization_params, config.candidates) == (8, {THRESHOLD: 1.5}, None)


@pytest.mark.parametrize(
    ("quantizer", "stored"),
    [
        (WeightsQuantizer(weights_config()), False),
        (ActivationQuantizer(activation_config()), True),
        (UniformActivationQuantizer(activation_config(method=QuantizationMethod.UNIFORM)), False),
    ],
)
def test_only_an_activations_threshold_leaves_the_sign_open(quantizer: BaseTrainableQuantizer, *, stored: bool) -> None:
    assert quantizer.stores_sign is stored


# --- Documents


@pytest.mark.parametrize(
    "quantizer",
    [
        WeightsQuantizer(weights_config(), freeze_quant_params=True),
        initialized(weights_config(params={THRESHOLD: 0.1})),
        initialized(per_channel({THRESHOLD: [1.0, 2.0, 3.0]}, axis=-1)),
        initialized(choosing_config(), cls=ChoosingQuantizer),
        initialized_activation({THRESHOLD: 2.0, SIGNED: False}),
    ],
    ids=["not initialized, frozen", "per tensor", "per channel", "candidates", "unsigned"],
)
def test_a_quantizer_comes_back_from_its_json(quantizer: BaseTrainableQuantizer) -> None:
    document = json.loads(json.dumps(quantizer.get_config()))
    back = type(quantizer).from_config(document)
    assert back.get_config() == quantizer.get_config()
    assert back.quantization_config == quantizer.quantization_config
    assert back.calibrated is quantizer.calibrated


def test_trained_values_come_back_bit_for_bit() -> None:
    quantizer = initialized(per_channel({THRESHOLD: [1.0, 2.0]}))
    trained = np.array([np.nextafter(np.float32(1), np.float32(2)), np.float32(0.1)])
    quantizer.assign(quantizer.get_quantizer_variable(THRESHOLD), trained)
    back = WeightsQuantizer.from_config(json.loads(json.dumps(quantizer.get_config())))
    np.testing.assert_array_equal(back.get_quantizer_variable(THRESHOLD), trained)


def test_a_sign_that_calibration_decided_comes_back() -> None:
    quantizer = initialized_activation({})
    quantizer.set_quantization_params({4: {THRESHOLD: 2.0, SIGNED: False}})
    assert ActivationQuantizer.from_config(quantizer.get_config()).current_qparams().quant_min == 0


def test_a_methods_own_arguments_and_variables_come_back() -> None:
    quantizer = ChoosingQuantizer(choosing_config(), temperature=0.25)
    quantizer.initialize_quantization((2, 3), "w", None)
    quantizer.assign(quantizer.get_quantizer_variable("attention"), np.array([5.0, 7.0]))
    back = ChoosingQuantizer.from_config(quantizer.get_config())
    assert back.temperature == 0.25
    assert back.get_quantizer_variable("attention").tolist() == [5.0, 7.0]


@pytest.mark.parametrize("part", ["quantization_config", "freeze_quant_params", "variables", "signed", "tensor_ndim"])
def test_a_document_that_lacks_a_part_is_refused(part: str) -> None:
    document = initialized(weights_config(params={THRESHOLD: 1.0})).get_config()
    del document[part]
    with pytest.raises(InvalidArgumentError, match=part):
        WeightsQuantizer.from_config(document)


def test_a_document_with_a_wrong_config_names_the_field() -> None:
    document = initialized(weights_config(params={THRESHOLD: 1.0})).get_config()
    document["quantization_config"]["weights_n_bits"] = 99
    with pytest.raises(ValidationError, match="weights_n_bits"):
        WeightsQuantizer.from_config(document)
