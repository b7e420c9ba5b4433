"""A quantizer as part of a saved model: a trainable one by its registered key, an inferable one by target and grid.

Keys are looked up in the registry, so a plugin's quantizers are found again without custom objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.registry.process import get_trainable_quantizer_class

ClassOf = Callable[..., Any]
"""The backend's inferable class of a target and a grid, and of the kind of one that mctq lacks."""


def quantizer_document(quantizer: Any) -> dict[str, Any]:
    """Return a quantizer as a JSON-clean document."""
    if isinstance(quantizer, BaseTrainableQuantizer):
        config = quantizer.quantization_config
        key = [config.target.name, quantizer.training_method, config.quantization_method.name]
        return {"trainable": key, "subject": quantizer.subject, "config": quantizer.get_config()}
    key = [quantizer.quantization_target.name, quantizer.quantization_method[0].name]
    native = getattr(quantizer, "native", "")
    key += [native] if native else []
    return {"inferable": key, "config": quantizer.get_config()}


def quantizer_from_document(document: Mapping[str, Any], backend: str, class_of: ClassOf) -> Any:
    """Return a quantizer equal to the one that `quantizer_document` was called on.

    Parameters
    ----------
    document : mapping
        What `quantizer_document` returned.
    backend : str
        Whose trainable quantizers.
    class_of : callable
        The backend's inferable class of a target and a grid, and of the kind of one that mctq lacks.

    Raises
    ------
    UnknownQuantizerError
        When the plugin that has it is not installed.
    """
    if "trainable" in document:
        target, training_method, method = document["trainable"]
        cls = get_trainable_quantizer_class(target, training_method, method, backend=backend)
        quantizer = cls.from_config(document["config"])
        quantizer.subject = document["subject"]
        return quantizer
    target, method, *native = document["inferable"]
    return class_of(QuantizationTarget[target], QuantizationMethod[method], *native).from_config(document["config"])
