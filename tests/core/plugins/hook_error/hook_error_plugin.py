"""A plugin whose hook raises for every backend."""

from __future__ import annotations

from typing import Any

from trainable_core.hookspecs import hookimpl


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type[Any]]:
    """Raise."""
    message = f"no driver for {backend} [code 7]"
    raise RuntimeError(message)
