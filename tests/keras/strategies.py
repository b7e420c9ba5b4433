"""What the Keras tests draw from beside what every backend's do: this backend's quantizers."""

from __future__ import annotations

from typing import Any

from tests.strategies import Kinds

DTYPES = ("float32", "float16", "bfloat16", "float64")

KINDS = Kinds("keras")
every_kind, kinds_of = KINDS.every, KINDS.of


def end_schedule(quantizer: Any) -> None:
    """Lead a quantizer with a schedule to its end."""
    if hasattr(quantizer, "temperature"):
        quantizer.step.assign(int(quantizer.temperature.t_end) + 1)
