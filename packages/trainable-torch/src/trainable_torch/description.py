"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainable_core.backend.description import Description, rows_of
from trainable_core.backend.view import QuantizedTensor
from trainable_core.recipe.plan import LayerPlan
from trainable_core.recipe.state import WrappedState
from trainable_torch.bias import BiasQuantizer
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.layers import kind_of
from trainable_torch.ranks import require_whole
from trainable_torch.state import added_layers, plan_of, present_state
from trainable_torch.structure.operations import CONTAINER
from trainable_torch.training import evaluating
from trainable_torch.wrapper import QuantizationWrapper

NEVER_READ = "no forward has read this weight so far"
"""What is told of a weight that has a quantizer, and has not passed through it though the model has run."""


def describe(qmodel: nn.Module) -> Description:
    """Return what `wrap` made of a model: one row for each quantizer, and the reasons for what was left out.

    Parameters
    ----------
    qmodel : Module
        A wrapped or finalized model.

    Returns
    -------
    Description
        Prints as a table; `to_dict` and `to_json` give the same as a document. Once some quantized weight was read in
        a forward, in calibration for instance, those that were not are listed among what is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped, or sharded over ranks.
    """
    state = present_state(qmodel)
    require_whole(qmodel, "describe")
    unread: dict[str, int] = {}
    seen: dict[int, list[bool]] = {}  # by the parameter, which layers may share
    float_biases: dict[str, str] = {}
    for path, module in qmodel.named_modules():
        name = path or "model"
        if isinstance(module, BiasQuantizer) and module.is_switched_off:
            float_biases[module.subject] = (
                "it stays float: the quantizer of the layer's input or weight is switched off"
            )
        if isinstance(module, QuantizationWrapper):
            with evaluating(module), torch.no_grad():  # in training, reading a computed weight may go on computing it
                weights = module.get_weights_vars()
            for attribute, weight, _ in weights:
                seen.setdefault(id(weight), []).append(module.weights_read[attribute])
                unread[f"{name}.{attribute}"] = id(weight)
    left_out = state.left_out | float_biases
    if any(map(any, seen.values())):  # the model has run, by forwards that are not compiled
        left_out |= {name: NEVER_READ for name, weight in unread.items() if not any(seen[weight])}
    left_out |= _added(qmodel)
    biases = {bias: source for bias, source in state.biases.items() if bias not in float_biases}
    return Description(
        rows_of(quantized_tensors(qmodel, state)),
        left_out,
        dict(state.folded),
        state.finalized,
        biases=biases,
        islands=dict(state.islands),
    )


def quantized_tensors(qmodel: nn.Module, state: WrappedState) -> Iterator[QuantizedTensor]:
    """Yield the quantized tensors of a model, of which this is the present state, in the model's order."""
    held: set[nn.Module] = set()
    for path, module in qmodel.named_modules():
        name = path or "model"
        if isinstance(module, QuantizationWrapper):
            plan = plan_of(name, module)
            for attribute, quantizer in module.weights_quantizers.items():
                yield QuantizedTensor(plan.layer, str(attribute), plan.weights[attribute], quantizer, module)
            own = [*module.input_holders.items()]
            own += [] if module.output_holder is None else [("output", module.output_holder)]
            for tensor, holder in own:
                yield _held(plan, tensor, holder)
            held |= set(module.holders)
        elif isinstance(module, ActivationQuantizationHolder) and module not in held:
            operation, tensor = place_of_holder(name.removeprefix(f"{CONTAINER}."))
            yield _held(state.plans[operation], tensor, module)


def _held(plan: LayerPlan, tensor: str, holder: Any) -> QuantizedTensor:
    of_tensor = plan.float_inputs if plan.integer and tensor != "output" else plan.activation
    assert of_tensor is not None  # noqa: S101 - there is a holder, so there was a plan for it
    return QuantizedTensor(plan.layer, tensor, of_tensor, holder.activation_holder_quantizer, holder)


def _added(qmodel: nn.Module) -> dict[str, str]:
    """Return the layers that came into the model after it was wrapped, and are float."""
    added = added_layers(qmodel)
    kinds = {name: kind_of(each) for name, each in qmodel.named_modules() if each in added}
    why = "it came into the model after wrapping; wrap the model with it to quantize it"
    return {name: why for name, kind in kinds.items() if kind is not None and (kind.weights or kind.unsupported)}


def place_of_holder(name: str) -> tuple[str, str]:
    """Return layer and tensor of a holder, from its name.

    Names are such as ``fc.input_holders.input``, ``fc.output_holder`` and ``add_input_0_holder``.
    """
    if ".input_holders." in f".{name}":
        layer, _, tensor = f".{name}".rpartition(".input_holders.")
        return layer.lstrip(".") or "model", tensor
    if f".{name}".endswith(".output_holder"):
        return name.removesuffix("output_holder").rstrip(".") or "model", "output"
    stem = name.removesuffix("_holder")
    for mark in ("_output", "_input_"):
        layer, found, index = stem.rpartition(mark)
        if found and (not index or index.isdigit()):
            return layer, f"{mark.strip('_')} {index}".strip()
    return name, "output"
