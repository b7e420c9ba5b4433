"""From a trained model to the deployed one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainable_core.backend.building import require_calibrated
from trainable_keras.keras2.copying import Copier
from trainable_keras.keras2.wrapping import note, parts_of, state_of, trainable_quantizers


def finalize(qmodel: Any) -> Any:
    """Return a new model with inferable quantizers, which gives bit for bit what `qmodel` gives in inference.

    Parameters
    ----------
    qmodel : tf.keras.Model
        A wrapped, calibrated model; left as it is, and still trains.

    Returns
    -------
    tf.keras.Model
        Not compiled, with inferable quantizers in wrappers and holders. Of a finalized model a copy is returned.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    QuantizerStateError
        When a quantizer has no numbers yet; names the layers.
    """
    state = state_of(qmodel)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")
    deployed = Copier(lambda layer, name: None).copy(qmodel)  # noqa: ARG005 - nothing is replaced
    for part in parts_of(deployed):
        part.convert_to_inferable_quantizers()
    note(deployed, replace(state, finalized=True))
    return deployed
