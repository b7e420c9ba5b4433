"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from typing import Any

from trainable_core.backend.description import Description
from trainable_keras.keras3.wrapping import parts_of, state_of
from trainable_keras.parts import describe_parts


def describe(qmodel: Any) -> Description:
    """Return what `wrap` made of a model: one row for each quantizer, and the reasons for what was left out.

    Parameters
    ----------
    qmodel : keras.Model
        A wrapped or finalized model.

    Returns
    -------
    Description
        Prints as a table; `to_dict` and `to_json` give the same as a document.
    """
    state = state_of(qmodel)
    return describe_parts(parts_of(qmodel), state)
