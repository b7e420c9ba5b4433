"""A second provider of backend alpha."""

from __future__ import annotations

from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl


@hookimpl
def trainable_register_backend() -> Backend:
    """Describe a backend whose name is taken."""
    return Backend("alpha", "second-alpha", ("numpy",), TieRule.HALF_UP, "second_alpha_plugin")
