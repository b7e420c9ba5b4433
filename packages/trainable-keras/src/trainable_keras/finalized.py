"""From a trained model to the deployed one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from trainable_core.backend.building import require_calibrated
from trainable_keras.copying import copy_model
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasWrapper, check_biases
from trainable_keras.wrapping import note, parts_of, state_of, trainable_quantizers


def finalize(framework: Framework, qmodel: Any) -> Any:
    """Return a new model with inferable quantizers; see `trainable_keras.finalize`."""
    state = state_of(framework, qmodel)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")
    check_biases(parts_of(qmodel), framework.functions.to_numpy)
    deployed = copy_model(framework, qmodel)
    with framework.strategy_of(qmodel):
        _store_values(framework, parts_of(deployed))
        for part in parts_of(deployed):
            part.convert_to_inferable_quantizers()
    note(framework, deployed, replace(state, finalized=True))
    return deployed


def _store_values(framework: Framework, parts: Iterable[Any]) -> None:
    """Put the quantized values in the place of float weights whose method deploys these; see `deploys_values`."""
    wrappers = [part for part in parts if isinstance(part, KerasWrapper)]
    weights = {id(w): (w, q) for wrapper in wrappers for _, w, q in wrapper.get_weights_vars()}  # shared weights once
    for weight, quantizer in weights.values():
        if getattr(quantizer, "deploys_values", False) and quantizer.quantization_config.enabled:  # not inferable yet
            values = quantizer(framework.functions.read(weight), training=False)
            framework.assign(weight, framework.functions.to_numpy(values))
