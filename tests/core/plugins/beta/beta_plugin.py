"""A second backend; asking for alpha must not import its framework."""

from __future__ import annotations

from typing import Any

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl


@hookimpl
def trainable_register_backend() -> Backend:
    """Describe the backend."""
    return Backend("beta", "trainable-beta", ("numpy", "pluggy"), TieRule.HALF_UP, "beta_plugin")


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Return the class of backend beta."""
    if backend != "beta":
        return []
    from beta_quantizers import SteQuantizer

    return [SteQuantizer]
