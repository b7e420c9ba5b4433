"""From a trained model to the deployed one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainable_core.backend.building import require_calibrated
from trainable_keras.copying import copy_model
from trainable_keras.framework import Framework
from trainable_keras.wrapping import note, parts_of, state_of, trainable_quantizers


def finalize(framework: Framework, qmodel: Any) -> Any:
    """Return a new model with inferable quantizers; see `trainable_keras.finalize`."""
    state = state_of(framework, qmodel)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")
    deployed = copy_model(framework, qmodel)
    with framework.strategy_of(qmodel):
        for part in parts_of(deployed):
            part.convert_to_inferable_quantizers()
    note(framework, deployed, replace(state, finalized=True))
    return deployed
