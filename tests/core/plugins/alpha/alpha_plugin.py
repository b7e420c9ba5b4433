"""A backend as it should be: described without its framework, imported for its own name only."""

from __future__ import annotations

from typing import Any

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl


@hookimpl
def trainable_register_backend() -> Backend:
    """Describe the backend."""
    return Backend("alpha", "trainable-alpha", ("numpy",), TieRule.HALF_EVEN, "alpha_plugin")


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Return the classes of backend alpha."""
    if backend != "alpha":
        return []
    from alpha_quantizers import LsqActivationQuantizer, LsqWeightsQuantizer

    return [LsqWeightsQuantizer, LsqActivationQuantizer]
