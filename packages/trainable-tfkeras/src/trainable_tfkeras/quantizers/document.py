"""A quantizer inside a saved model; what the documents are is core's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainable_core import saved_quantizer
from trainable_core.saved_quantizer import quantizer_document
from trainable_tfkeras import inferable
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer

__all__ = ["quantizer_document", "quantizer_from_document"]


def quantizer_from_document(document: Mapping[str, Any]) -> Any:
    """Return a quantizer equal to the one that `quantizer_document` was called on.

    Raises
    ------
    UnknownQuantizerError
        When the plugin that has it is not installed.
    """
    return saved_quantizer.quantizer_from_document(document, BaseKerasTrainableQuantizer.backend, inferable.class_of)
