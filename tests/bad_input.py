"""Bad input that is core's to refuse, tried in every backend: recipes, configs, documents, arguments.

A row is (what is given, the error, facts that its message tells), under a name that says what is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import THRESHOLD
from trainable_core.enums import QuantizationMethod
from trainable_core.errors import (
    DocumentError,
    InvalidArgumentError,
    RuleError,
    TrainableError,
    UnknownQuantizerError,
    UnsupportedConfigError,
)

NAN, INF = math.nan, math.inf
Refusal = tuple[Any, type[Exception], tuple[str, ...]]
Row = tuple[str, str, Callable[[Any], object], type[Exception], tuple[str, ...]]


# ---- what is asked of a refusal -------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Return what an error says of the input, without the input itself: an echo names no field."""
    if isinstance(error, ValidationError):
        details = error.errors(include_input=False, include_url=False, include_context=False)
        return "\n".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
    return str(error)


def refused(call: Callable[[], object], error: type[Exception], facts: tuple[str, ...]) -> None:
    """Assert that a call raises a typed error that tells these facts."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, TrainableError | ValidationError)
    message = told(caught.value)
    assert [fact for fact in facts if fact not in message] == []


def row(what: str, state: str, call: Callable[[Any], object], error: type[Exception], *facts: str) -> Row:
    """Return a row of a table: what is wrong, the model's state, the call, the error, what the message says."""
    return what, state, call, error, facts


def table(*rows: Row) -> pytest.MarkDecorator:
    """Parametrize a test with rows."""
    return pytest.mark.parametrize(("state", "call", "error", "facts"), [r[1:] for r in rows], ids=[r[0] for r in rows])


# ---- recipes --------------------------------------------------------------------------------------------------------


def _spec(training_method: str = "STE", **changes: Any) -> dict[str, Any]:
    return {"method": "SYMMETRIC", "n_bits": 4, "training_method": training_method, **changes}


def temperature(**changes: Any) -> dict[str, Any]:
    """Return a schedule with something wrong."""
    return {"t_start": 0, "t_end": 10, "initial_val": 1.0, "target_val": 0.1, **changes}


def recipes(backend: str, weight: str, names: str) -> dict[str, Refusal]:
    """Return recipes that don't go with a model.

    Parameters
    ----------
    backend : str
        The backend's name.
    weight : str
        Full name of the model's first weight.
    names : str
        Its layers, as errors list them. It has a layer ``relu`` without weights, a linear layer ``head``, and no
        embedding.
    """
    both = {"weights": _spec("LSQ"), "activations": _spec("LSQ", method="UNIFORM")}

    def ruled(
        rule: dict[str, Any], error: type[Exception], *facts: str
    ) -> tuple[Any, type[Exception], tuple[str, ...]]:
        return {**both, "rules": [rule]}, error, ("rules.0", *facts)

    unsupported, invalid = UnsupportedConfigError, InvalidArgumentError
    return {
        "no recipe": (None, DocumentError, ("NoneType", "QuantizationRecipe")),
        "a number for a recipe": (4, DocumentError, ("int", "QuantizationRecipe")),
        "a list for a recipe": ([_spec()], DocumentError, ("list", "QuantizationRecipe")),
        "a missing file": ("missing.yaml", DocumentError, ("missing.yaml",)),
        "a folder": (os.curdir, DocumentError, ("can't be read",)),
        "a misspelt part": ({"weight": _spec()}, ValidationError, ("weight: ",)),
        "40 bits": ({"weights": _spec(n_bits=40)}, ValidationError, ("weights.n_bits",)),
        "unknown method": (
            {"weights": _spec(method="SYMETRIC")}, ValidationError, ("weights.method", "mean SYMMETRIC"),
        ),
        "equal candidates": ({"weights": _spec(candidates=[2, 2])}, ValidationError, ("weights.candidates",)),
        "unknown training method": (
            {"weights": _spec("LSG")},
            UnknownQuantizerError,
            (f"{backend}/Weights/LSG/SYMMETRIC", f"{backend}/Weights/LSQ/SYMMETRIC", "did you mean 'LSQ'"),
        ),
        "a grid nobody trains": (
            {"weights": _spec(method="LUT_SYM_QUANTIZER")},
            UnknownQuantizerError,
            ("LUT_SYM_QUANTIZER", "needs method: POWER_OF_TWO or SYMMETRIC or UNIFORM", "has APOT, DKM"),
        ),
        "a method on a grid of others": (
            {"weights": _spec("DKM")},
            UnknownQuantizerError,
            ("needs method: LUT_POT_QUANTIZER or LUT_SYM_QUANTIZER", "SYMMETRIC has"),
        ),
        "a method for weights alone": (
            {"activations": _spec("DOREFA")}, UnknownQuantizerError, ("DOREFA is a training method for Weights alone",),
        ),
        "a grid the target has not": (
            {"weights": _spec(method="LUT_SYM_QUANTIZER", n_bits=16)},
            unsupported,
            (weight, "mctq", "LUT_SYM_QUANTIZER"),
        ),
        "unknown argument": (
            {"weights": _spec("DQA", arguments={"temprature": {}})},
            invalid,
            (weight, "arguments.temprature", "temperature, bit_cost_weight"),
        ),
        "the config as an argument": (
            {"weights": _spec(arguments={"quantization_config": {}})}, invalid, ("arguments.quantization_config",),
        ),
        "frozen by a word": (
            {"weights": _spec(arguments={"freeze_quant_params": "no"})}, invalid, ("freeze_quant_params", "'no'"),
        ),
        "an argument of the wrong kind": (
            {"weights": _spec("DQA", arguments={"bit_cost_weight": "much"})},
            invalid,
            ("bit_cost_weight", "'much'"),
        ),
        "a schedule that runs backwards": (
            {"weights": _spec("DQA", arguments={"temperature": temperature(t_start=20)})},
            invalid,
            ("temperature", "t_end must be greater than t_start"),
        ),
        "an unknown layer": ruled({"match": {"name": "haed"}, "skip": True}, RuleError, "haed", names),
        "an op that is not there": ruled(
            {"match": {"op": "linaer"}, "skip": True}, ValidationError, "match.op", "linear"
        ),
        "an op the model lacks": ruled({"match": {"op": "embedding"}, "skip": True}, RuleError, "embedding", names),
        "weights of an activation": ruled({"match": {"name": "relu"}, "weights": {"n_bits": 8}}, RuleError, "relu"),
        "a rule that changes nothing": ruled({"match": {"name": "head"}}, ValidationError, "changes nothing"),
        "a rule's 40 bits": ruled(
            {"match": {"name": "head"}, "weights": {"n_bits": 40}}, ValidationError, "weights.n_bits"
        ),
        "half a spec": (
            {"rules": [{"match": {"name": "head"}, "weights": {"n_bits": 8}}]},
            unsupported,
            ("head: weights", "training_method"),
        ),
        "a rule's unknown training method": (
            {**both, "rules": [{"match": {"name": "head"}, "activations": {"training_method": "LSG"}}]},
            UnknownQuantizerError,
            (f"{backend}/Activation/LSG/UNIFORM",),
        ),
    }  # fmt: skip


# ---- configs and documents of quantizers ----------------------------------------------------------------------------


def weights_config(params: Any = None, **fields: Any) -> TrainableQuantizerWeightsConfig:
    """Return a 4-bit weights config."""
    good = {
        "weights_quantization_method": "SYMMETRIC",
        "weights_n_bits": 4,
        "weights_quantization_params": params or {},
    }
    return TrainableQuantizerWeightsConfig(**{**good, **fields})


def activation_config(**fields: Any) -> TrainableQuantizerActivationConfig:
    """Return a 4-bit activation config."""
    good = {"activation_quantization_method": "SYMMETRIC", "activation_n_bits": 4, "activation_quantization_params": {}}
    return TrainableQuantizerActivationConfig(**{**good, **fields})


def refuses_configs_it_is_not_for(cls: type[Any]) -> None:
    """Assert that a quantizer class takes the configs of its target and grids, and no others."""
    weights = cls.quantization_target.name == "Weights"
    own, other = (weights_config, activation_config) if weights else (activation_config, weights_config)
    refused(lambda: cls(other()), UnsupportedConfigError, (cls.__name__, "Activation" if weights else "Weights"))
    prefix = own().prefix
    grids = [grid.name for grid in cls.quantization_method]
    fields = {f"{prefix}_n_bits": 2, f"{prefix}_quantization_params": {}}  # a width that every method has
    for method in QuantizationMethod:
        config = own(**{**fields, f"{prefix}_quantization_method": method})
        if method.name in grids:
            assert cls(config).quantization_config is config
        else:
            refused(lambda config=config: cls(config), UnsupportedConfigError, (cls.__name__, str(method), grids[0]))
    refused(lambda: cls(None), InvalidArgumentError, (cls.__name__, "NoneType"))
    good = own(**{**fields, f"{prefix}_quantization_method": grids[0]})
    refused(lambda: cls(good, freeze_quant_params=1), InvalidArgumentError, (cls.__name__, "freeze_quant_params"))


RUBBISH: dict[str, tuple[Any, str]] = {
    "nothing": (None, "None"),
    "an empty mapping": ({}, "'quantization_config'"),
    "an unknown argument": ({"arguments": {"heat": 1}}, "heat"),
    "arguments that are none": ({"arguments": None}, "arguments"),
    "an unknown variable": ({"variables": {"scale": 1.0}}, "variables"),
    "one channel too many": ({"variables": {THRESHOLD: [1.0, 2.0]}}, "threshold"),
    "text for a variable": ({"variables": {THRESHOLD: "x"}}, "variables.threshold"),
    "text for dimensions": ({"tensor_ndim": "two"}, "tensor_ndim"),
    "text for a sign": ({"signed": "yes"}, "signed"),
    "text for frozen": ({"freeze_quant_params": "no"}, "freeze_quant_params"),
}
"""Changes of a quantizer's document, or what is none, and what the refusal tells."""


def refuses_a_document(quantizer: Any, given: Any, fact: str) -> None:
    """Assert that a class refuses the document of one of its quantizers with a change of `RUBBISH`."""
    document = {**quantizer.get_config(), **given} if given else given
    refused(lambda: type(quantizer).from_config(document), TrainableError, (fact,))


DQA_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"temperature": 5}, "mapping"),
    "a word": ({"temperature": "hot"}, "'hot'"),
    "a list": ({"temperature": [0, 10]}, "mapping"),
    "half a schedule": ({"temperature": {"t_start": 0, "t_end": 10}}, "initial_val, target_val"),
    "a misspelt field": ({"temperature": temperature(target_value=0.1)}, "did you mean 'target_val'"),
    "a field that is a number": ({"temperature": {1: 2}}, "1"),
    "no steps": ({"temperature": temperature(t_end=0)}, "t_end must be greater than t_start"),
    "backwards": ({"temperature": temperature(t_start=20)}, "t_end must be greater than t_start"),
    "NaN steps": ({"temperature": temperature(t_end=NAN)}, "t_end"),
    "a word for a step": ({"temperature": temperature(t_start="soon")}, "t_start"),
    "absolute zero": ({"temperature": temperature(target_val=0.0)}, "target_val must be positive"),
    "below zero": ({"temperature": temperature(initial_val=-1.0)}, "initial_val"),
    "a negative cost": ({"bit_cost_weight": -1.0}, "-1.0"),
    "a NaN cost": ({"bit_cost_weight": NAN}, "nan"),
    "an infinite cost": ({"bit_cost_weight": INF}, "inf"),
    "a cost beyond float64": ({"bit_cost_weight": 10**400}, "1000"),
    "a bool cost": ({"bit_cost_weight": True}, "True"),
    "a word for a cost": ({"bit_cost_weight": "much"}, "'much'"),
}
"""Arguments of DQA's weights quantizer, and what the refusal tells."""


def refuses_an_argument(cls: type[Any], arguments: dict[str, Any], fact: str) -> None:
    """Assert that DQA's weights quantizer refuses one of `DQA_ARGUMENTS`."""
    (argument,) = arguments
    refused(
        lambda: cls(weights_config(), **arguments), InvalidArgumentError, (f"DqaWeightsQuantizer: {argument}", fact)
    )
