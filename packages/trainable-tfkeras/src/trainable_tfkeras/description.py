"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from typing import Any

from trainable_core.description import Description, describe_quantizer
from trainable_tfkeras.wrapper import QuantizationWrapper
from trainable_tfkeras.wrapping import parts_of, state_of


def describe(qmodel: Any) -> Description:
    """Return what `wrap` made of a model: one row for each quantizer, and the reasons for what was left out.

    Parameters
    ----------
    qmodel : tf.keras.Model
        A wrapped or finalized model.

    Returns
    -------
    Description
        Prints as a table; `to_dict` and `to_json` give the same as a document.
    """
    state = state_of(qmodel)
    rows = []
    for part in parts_of(qmodel):
        plan = part.plan
        assert plan is not None  # noqa: S101 - `wrap` puts a plan on every part
        holders = [part]
        if isinstance(part, QuantizationWrapper):
            holders = part.holders
            for attribute, quantizer in part.weights_quantizers.items():
                rows.append(describe_quantizer(plan.layer, attribute, plan.weights[attribute], quantizer))
        for holder in holders:
            assert plan.activation is not None  # noqa: S101 - there is a holder, so there was a plan for it
            rows.append(
                describe_quantizer(plan.layer, holder.tensor, plan.activation, holder.activation_holder_quantizer)
            )
    return Description(tuple(rows), dict(state.left_out), dict(state.folded), finalized=state.finalized)
