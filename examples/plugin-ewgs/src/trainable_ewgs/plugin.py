"""The hook that hands over the classes."""

from __future__ import annotations

from trainable_core import hookimpl


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type]:
    """Return the EWGS quantizers of a backend."""
    if backend == "torch":
        from trainable_ewgs.torch_quantizers import EwgsActivationQuantizer, EwgsWeightsQuantizer  # noqa: PLC0415

        return [EwgsWeightsQuantizer, EwgsActivationQuantizer]
    return []
