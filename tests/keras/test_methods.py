"""Every built-in method's golden vectors, in its Keras quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.keras.framework import BACKEND, gradients, numpy, tensor
from tests.method_vectors import check_case, method_cases
from trainable_core.enums import TieRule


def run(quantizer: Any, x: np.ndarray, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    d_x, d_variables = gradients(quantizer, x, upstream, training=True)
    return numpy(quantizer(tensor(x), training=True)), numpy(d_x), {k: numpy(v) for k, v in d_variables.items()}


@method_cases(BACKEND, TieRule.HALF_UP)
def test_golden_vectors(cls: Any, case: dict[str, Any]) -> None:
    check_case(cls, case, run)
