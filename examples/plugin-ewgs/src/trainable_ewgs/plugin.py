"""The hook that hands over the classes."""

from __future__ import annotations

from trainable_core import hookimpl


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type]:
    """Return the EWGS quantizers of a backend."""
    if backend == "torch":
        from trainable_ewgs import torch_quantizers  # noqa: PLC0415

        return [torch_quantizers.EwgsWeightsQuantizer, torch_quantizers.EwgsActivationQuantizer]
    if backend == "keras":
        from trainable_ewgs import keras_quantizers  # noqa: PLC0415

        return [keras_quantizers.EwgsWeightsQuantizer, keras_quantizers.EwgsActivationQuantizer]
    return []
