"""A plugin that returns a tuple where a list of classes belongs."""

from __future__ import annotations

from typing import Any

from trainable_core.hookspecs import hookimpl


@hookimpl
def trainable_register_quantizers(backend: str) -> Any:
    """Return what is not a list."""
    return (backend,)
