"""A backend whose framework is not installed."""

from __future__ import annotations

from typing import Any

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl


@hookimpl
def trainable_register_backend() -> Backend:
    """Describe the backend."""
    return Backend("gamma", "trainable-gamma", ("gamma-framework",), TieRule.HALF_EVEN, "gamma_plugin")


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Import what is not there."""
    if backend != "gamma":
        return []
    import gamma_framework

    return [gamma_framework.Quantizer]
