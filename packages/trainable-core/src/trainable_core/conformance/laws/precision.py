"""Laws on dtypes: gradients are computed in float32, whatever the input is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.conformance.case import Case, Subject, Violation
from trainable_core.conformance.law import law, repeatable, require, same_bits
from trainable_core.conformance.strategies import Kind

NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return float32 values rounded to a dtype, as float32 where NumPy lacks the dtype."""
    if dtype in NUMPY:
        return values.astype(NUMPY[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return np.where(np.isfinite(values), even.view(np.float32).reshape(values.shape), values)


SUMMED = 2.0**-20
"""Share of the upstream gradient by which two sums of it may differ: sixteen roundings of float32, and a five-hundredth
of what a half-precision number is rounded by. Frameworks add in another order where tensors lie otherwise in memory."""


def _same_sum(what: str, found: NDArray[Any], expected: NDArray[Any], upstream: NDArray[Any]) -> None:
    allowed = SUMMED * float(np.abs(upstream.astype(np.float64)).sum())
    distance = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    is_same = (found == expected) | (distance <= allowed) | (np.isnan(found) & np.isnan(expected))
    require(what, bool(is_same.all()), expected, found)


@law(
    "A model that trains in half precision must learn what it learns in float32: thresholds need all bits.",
    kind=Kind(moderate=True, finite=True),
    about=repeatable,
)
def dtype_gradients(subject: Subject, case: Case) -> None:
    """In every dtype, gradients are those of the float32 computation; the input's has the input's dtype."""
    for dtype in subject.adapter.dtypes[1:]:
        x = np.asarray(rounded(subject.normal(case.x), dtype), np.float32)
        x = np.where(np.isfinite(x), x, np.float32(0))
        for training in (False, True):
            got = subject.run(subject.quantizer(case), x, training=training, dtype=dtype, upstream=case.upstream)
            single = subject.run(subject.quantizer(case), x, training=training, upstream=case.upstream)
            if got.x is None or single.x is None:
                raise Violation(f"gradient of a {dtype} input", "an array", None)
            expected = rounded(single.x, dtype)
            same_bits(f"gradient of a {dtype} input", rounded(got.x.astype(np.float32), dtype), expected)
            for name, gradient in single.variables.items():
                found = got.variables[name]
                require(f"dtype of the gradient of {name}", found.dtype == np.float32, "float32", found.dtype)
                _same_sum(f"gradient of {name} for a {dtype} input", found, gradient, case.upstream)
