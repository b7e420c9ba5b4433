"""Where the inputs of layers come from: from which quantizer, past operations that only pass codes on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from trainable_core.recipe.routes import Origin
from trainable_keras.flow import FlatCall, Flow
from trainable_keras.operations import Names

UNSEEN = "what it is given is not known: only functional and Sequential models have a graph"
"""Why the input of a layer has no known quantizer, where no graph has a call of the layer."""


def inputs_of_calls(
    flow: Flow,
    named: Names,
    quantized: Collection[str],
    *,
    is_layer: Callable[[Any], bool],
    passes: Callable[[Any], bool],
    joins: Callable[[Any], bool],
) -> dict[str, list[list[Origin]]]:
    """Return where the inputs of each layer and operation come from: one list for each call.

    Parameters
    ----------
    flow : Flow
        The model's calls.
    named : callable
        Returns the name of a layer or functional operation.
    quantized : collection of str
        Names of those whose output has a quantizer.
    is_layer, passes, joins : callable
        Whether an operation is a layer; whether it passes on values of its first input; whether it only puts its inputs
        together.
    """
    known = {number: Origin("", f"t{number}", "it is an input of the model") for number in flow.inputs}
    found: dict[str, list[list[Origin]]] = {}
    for call in flow.calls:
        name = named(call.operation)
        if name:
            found.setdefault(name, []).append([known[number] for number in operands(call, is_layer)])
        label = name or str(call.operation.name)
        passed = call.inputs[:1] if passes(call.operation) else call.inputs if joins(call.operation) else ()
        for index, number in enumerate(call.outputs):
            if name in quantized and index == 0:
                known[number] = Origin(name)
            elif name in quantized:
                known[number] = Origin("", f"t{number}", f"it is an output of {label} without a quantizer")
            elif passed:
                known[number] = _joined({known[each] for each in passed}, f"t{number}")
            else:
                known[number] = Origin("", f"t{number}", f"{label} has no quantizer behind it")
    return found


def operands(call: FlatCall, is_layer: Callable[[Any], bool]) -> tuple[int, ...]:
    """Return the tensors that quantizers of inputs stand at: of a functional operation each once."""
    return call.inputs if is_layer(call.operation) else tuple(dict.fromkeys(call.inputs))


def _joined(origins: set[Origin], tensor: str) -> Origin:
    """Return the origin of values that come from several tensors."""
    (one, *others) = origins
    return Origin("", tensor, "it joins values of several grids") if others else one
