"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainable_core.backend.description import Description, DescriptionRow, describe_quantizer
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasPart, KerasWrapper, holders_of, told_of
from trainable_keras.wrapping import parts_of, state_of


def describe(framework: Framework, qmodel: Any) -> Description:
    """Return what `wrap` made of a model; see `trainable_keras.describe`."""
    state = state_of(framework, qmodel)
    rows = tuple(_rows(parts_of(qmodel)))
    return Description(rows, dict(state.left_out), dict(state.folded), finalized=state.finalized)


def _rows(parts: Sequence[KerasPart]) -> Iterator[DescriptionRow]:
    for part in parts:
        plan = told_of(part).plan
        assert plan is not None  # noqa: S101 - `wrap` puts a plan on every part
        if isinstance(part, KerasWrapper):
            for attribute, quantizer in part.weights_quantizers.items():
                yield describe_quantizer(plan.layer, attribute, plan.weights[attribute], quantizer)
        for holder in holders_of(part):
            assert plan.activation is not None  # noqa: S101 - there is a holder, so there was a plan for it
            yield describe_quantizer(
                plan.layer, told_of(holder).tensor, plan.activation, holder.activation_holder_quantizer
            )
