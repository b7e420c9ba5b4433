"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainable_core.backend.description import Description, rows_of
from trainable_core.backend.view import QuantizedTensor
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasPart, KerasWrapper, holders_of, plan_of, told_of
from trainable_keras.wrapping import BIASES, ISLANDS, parts_of, state_of


def describe(framework: Framework, qmodel: Any) -> Description:
    """Return what `wrap` made of a model; see `trainable_keras.describe`."""
    state = state_of(framework, qmodel)
    parts = parts_of(qmodel)
    return Description(
        rows_of(quantized_tensors(parts)),
        state.left_out | _unread(parts),
        dict(state.folded),
        finalized=state.finalized,
        biases=dict(state.structure.get(BIASES, {})),
        islands=dict(state.structure.get(ISLANDS, {})),
    )


def _unread(parts: Sequence[KerasPart]) -> dict[str, str]:
    """Return the quantized weights that no forward pass has read so far, once one has read any."""
    wrappers = [part for part in parts if isinstance(part, KerasWrapper)]
    if not any(told_of(wrapper).read for wrapper in wrappers):
        return {}  # the model has not run yet
    return {
        f"{plan_of(wrapper).layer.name}.{attribute}": "no forward pass has read this weight so far"
        for wrapper in wrappers
        for attribute in wrapper.weights_quantizers
        if attribute not in told_of(wrapper).read
    }


def quantized_tensors(parts: Sequence[KerasPart]) -> Iterator[QuantizedTensor]:
    """Yield the quantized tensors of a model that has these parts, in the model's order."""
    for part in parts:
        plan = plan_of(part)
        if isinstance(part, KerasWrapper):
            for attribute, quantizer in part.weights_quantizers.items():
                yield QuantizedTensor(plan.layer, attribute, plan.weights[attribute], quantizer, part)
        for holder in holders_of(part):
            tensor, of_holder = told_of(holder).tensor, plan_of(holder).activation
            assert of_holder is not None  # noqa: S101 - there is a holder, so there was a plan for it
            yield QuantizedTensor(plan.layer, tensor, of_holder, holder.activation_holder_quantizer, holder)
