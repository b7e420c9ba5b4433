"""The table of a backend's inferable quantizers: one class per target and grid."""

from __future__ import annotations

from typing import Any, TypeVar

from trainable_core.enums import QuantizationMethod, QuantizationTarget

T = TypeVar("T", bound=type)


def target_and_method(cls: Any) -> tuple[QuantizationTarget, QuantizationMethod]:
    """Return what a class with mctq's mark quantizes, and on which grid."""
    return QuantizationTarget[cls.quantization_target.name], QuantizationMethod[cls.quantization_method[0].name]


def by_grid(*classes: T) -> dict[tuple[QuantizationTarget, QuantizationMethod], T]:
    """Return a backend's inferable classes by what they quantize and on which grid."""
    return {target_and_method(cls): cls for cls in classes}
