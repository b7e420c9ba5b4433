"""The table of a backend's inferable quantizers: one class per target and grid; and what another library can't take."""

from __future__ import annotations

from typing import Any, TypeVar

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import UnsupportedConfigError

T = TypeVar("T", bound=type)


def target_and_method(cls: Any) -> tuple[QuantizationTarget, QuantizationMethod]:
    """Return what a class with mctq's mark quantizes, and on which grid."""
    return QuantizationTarget[cls.quantization_target.name], QuantizationMethod[cls.quantization_method[0].name]


def by_grid(*classes: T) -> dict[tuple[QuantizationTarget, QuantizationMethod], T]:
    """Return a backend's inferable classes by what they quantize and on which grid."""
    return {target_and_method(cls): cls for cls in classes}


class Refusals:
    """Everything about a model that another library can't express, told at once.

    Parameters
    ----------
    subject : str
        The verb that refuses.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.reasons: dict[str, str] = {}

    def add(self, tensor: str, reason: str) -> None:
        """Note the first reason why a tensor, named with its layer, can't be expressed."""
        self.reasons.setdefault(tensor, reason)

    def raise_if_any(self) -> None:
        """Raise UnsupportedConfigError with every reason."""
        if self.reasons:
            told = "\n".join(f"{tensor}: {reason}" for tensor, reason in self.reasons.items())
            raise UnsupportedConfigError(self.subject, f"mct-quantizers can't express this model\n{told}")
