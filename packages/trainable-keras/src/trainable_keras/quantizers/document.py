"""A quantizer inside a saved model: trainable ones by their registered key, deployed ones by class name.

Keys are looked up in the registry, so a plugin's quantizers are found again without custom objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.registry import get_trainable_quantizer_class
from trainable_keras import inferable
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer


def quantizer_document(quantizer: Any) -> dict[str, Any]:
    """Return a quantizer as a JSON-clean document."""
    if isinstance(quantizer, BaseKerasTrainableQuantizer):
        config = quantizer.quantization_config
        key = [config.target.name, quantizer.training_method, config.quantization_method.name]
        return {"trainable": key, "subject": quantizer.subject, "config": quantizer.get_config()}
    key = [quantizer.quantization_target.name, quantizer.quantization_method[0].name]
    return {"inferable": key, "config": quantizer.get_config()}


def quantizer_from_document(document: Mapping[str, Any]) -> Any:
    """Return a quantizer equal to the one that `quantizer_document` was called on.

    Raises
    ------
    UnknownQuantizerError
        When the plugin that has it is not installed.
    """
    if "trainable" in document:
        target, training_method, method = document["trainable"]
        cls = get_trainable_quantizer_class(target, training_method, method, backend="keras")
        quantizer = cls.from_config(document["config"])
        quantizer.subject = document["subject"]
        return quantizer
    target, method = document["inferable"]
    deployed = inferable.class_of(QuantizationTarget[target], QuantizationMethod[method])
    return deployed.from_config(document["config"])
