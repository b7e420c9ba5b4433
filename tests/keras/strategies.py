"""What the Keras tests draw from beside what every backend's do: the quantizers of the Keras that is tested."""

from __future__ import annotations

from typing import Any

from tests.keras.framework import BACKEND
from tests.strategies import Kinds

KINDS = Kinds(BACKEND)
every_kind, kinds_of = KINDS.every, KINDS.of


def end_schedule(quantizer: Any) -> None:
    """Lead a quantizer with a schedule to its end."""
    if hasattr(quantizer, "temperature"):
        quantizer.step.assign(int(quantizer.temperature.t_end) + 1)
