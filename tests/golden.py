"""Golden vectors: inputs and results that were worked out by hand or recorded elsewhere, `tests/vectors/*.json`.

Every case says where it came from. Numbers that JSON lacks are strings: "inf", "-inf", "nan".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainable_core.enums import QuantizationMethod, TieRule
from trainable_core.qparams import QParams, from_params

VECTORS = Path(__file__).parent / "vectors"


def every_case(name: str) -> list[dict[str, Any]]:
    """Return the cases of one file; a method's hold its own variables by their names."""
    found: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text())["cases"]
    return found


def cases(name: str, tie_rule: TieRule | None = None) -> pytest.MarkDecorator:
    """Parametrize a test with the cases of one file, or with those that hold under one tie rule."""
    found = [case for case in every_case(name) if tie_rule in (None, tie_rule_of(case))]
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


def array(values: Any, dtype: Any = np.float64) -> np.ndarray:
    """Return nested lists of numbers, or of the strings that stand for infinities and NaN, as an array."""
    return np.array(values, dtype=object).astype(dtype)


def grid_of(case: dict[str, Any], n_bits: int | None = None) -> QParams:
    """Return the grid that a case is about."""
    return from_params(
        QuantizationMethod[case["method"]],
        case["n_bits"] if n_bits is None else n_bits,
        case.get("signed", True),
        case["params"],
        case.get("min_threshold", 0.0),
        case.get("channels_axis"),
    )


def tie_rule_of(case: dict[str, Any]) -> TieRule:
    """Return the tie rule that a case is about."""
    return TieRule(case.get("tie_rule", "half_even"))
