"""The hook that hands over the classes."""

from __future__ import annotations

from trainable_core import hookimpl


@hookimpl
def trainable_register_quantizers(backend: str) -> list[type]:
    """Return the LOG_THRESHOLD and DSQ quantizers of a backend."""
    if backend == "torch":
        from trainable_log_threshold import torch_dsq, torch_log  # noqa: PLC0415

        log = [torch_log.LogWeightsQuantizer, torch_log.LogActivationQuantizer]
        return [*log, torch_dsq.DsqWeightsQuantizer, torch_dsq.DsqActivationQuantizer]
    if backend == "keras":
        from trainable_log_threshold import keras3_quantizers  # noqa: PLC0415

        return keras3_quantizers.QUANTIZERS
    if backend == "tf_keras":
        from trainable_log_threshold import keras2_quantizers  # noqa: PLC0415

        return keras2_quantizers.QUANTIZERS
    return []
