"""The golden vectors of every built-in method, as quantizers of a backend meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.golden import array, every_case
from trainable_core import list_quantizers
from trainable_core.config import TrainableQuantizerActivationConfig, TrainableQuantizerWeightsConfig
from trainable_core.constants import SIGNED
from trainable_core.enums import QuantizationTarget, TieRule
from trainable_core.registry.methods import built_in_methods

ROUNDED = 32 * 2.0**-24
"""Each number is a sum of at most six terms, made by few float32 operations."""


def method_cases(backend: str, tie_rule: TieRule) -> pytest.MarkDecorator:
    """Parametrize a test with a quantizer class and a case of its method, for each target that can have the case."""
    made = []
    for row in list_quantizers(backend):
        method = built_in_methods().get(row.training_method)
        for case in [] if method is None else every_case(method.module.rpartition(".")[2]):
            weights = row.target is QuantizationTarget.Weights
            is_of_one_step = not case.keys() & {"widths", "steps"}  # others are tried with their methods' own state
            fits = case["method"] in {each.name for each in row.methods} and is_of_one_step
            fits &= case.get("signed", True) if weights else "channels_axis" not in case or row.cls.computes_grid
            if fits and case.get("tie_rule") in {tie_rule.value, None}:  # none: there are no ties in it
                made.append(pytest.param(row.cls, case, id=f"{row.cls.__name__}: {case['name']}"))
    return pytest.mark.parametrize(("cls", "case"), made)


def quantizer_of(cls: type[Any], case: dict[str, Any]) -> Any:
    """Return the quantizer that a case is about, initialized."""
    axis = case.get("channels_axis")
    params = {} if cls.computes_grid else case["params"]
    if cls.quantization_target.name == "Weights":
        config: Any = TrainableQuantizerWeightsConfig(
            weights_quantization_method=case["method"],
            weights_n_bits=case["n_bits"],
            weights_quantization_params=params,
            weights_channels_axis=axis,
            weights_per_channel_threshold=axis is not None,
            min_threshold=0.0,
        )
    else:
        sign = {} if case["method"] == "UNIFORM" else {SIGNED: case.get("signed", True)}
        config = TrainableQuantizerActivationConfig(
            activation_quantization_method=case["method"],
            activation_n_bits=case["n_bits"],
            activation_quantization_params={**params, **sign},
            min_threshold=0.0,
        )
    quantizer = cls(config, **case.get("arguments", {}))
    quantizer.initialize_quantization(np.shape(case["x"]), "x", None)
    return quantizer


def check_case(
    cls: type[Any],
    case: dict[str, Any],
    run: Callable[[Any, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]],
) -> None:
    """Compare a quantizer's values and gradients with a case; `run` returns them, the variables' by name."""
    x, upstream = array(case["x"], np.float32), array(case["upstream"], np.float32)
    values, d_x, d_variables = run(quantizer_of(cls, case), x, upstream)
    if "values" in case:
        np.testing.assert_array_equal(values, array(case["values"], np.float32))
    np.testing.assert_allclose(d_x, case["d_x"], rtol=ROUNDED)
    assert set(d_variables) == set(case.get("d_variables", {}))
    for name, expected in case.get("d_variables", {}).items():
        np.testing.assert_allclose(d_variables[name], expected, rtol=ROUNDED, atol=ROUNDED)
