"""One of two plugins of the same name that both answer for the same key of a backend that neither provides."""

from __future__ import annotations

from typing import Any

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.hookspecs import hookimpl
from trainable_core.quantizer import BaseTrainableQuantizer


class EwgsQuantizer(BaseTrainableQuantizer):
    """Answers for weights."""

    backend = "alpha"
    quantization_target = QuantizationTarget.Weights
    quantization_method = (QuantizationMethod.SYMMETRIC,)
    identifier = "EWGS"


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Return the class for backend alpha."""
    return [EwgsQuantizer] if backend == "alpha" else []
