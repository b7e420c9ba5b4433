"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from trainable_core.description import Description, DescriptionRow

from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.quantizers.base import BasePytorchTrainableQuantizer
from trainable_torch.wrapper import QuantizationWrapper
from trainable_torch.wrapping import state_of


def describe(qmodel: nn.Module) -> Description:
    """Return what `wrap` made of a model: one row for each quantizer, and the reasons for what was left out.

    Parameters
    ----------
    qmodel : Module
        A wrapped or finalized model.

    Returns
    -------
    Description
        Prints as a table; `to_dict` and `to_json` give the same as a document.
    """
    state = state_of(qmodel)
    rows = []
    for name, module in qmodel.named_modules():
        if isinstance(module, QuantizationWrapper):
            for attribute, quantizer in module.weights_quantizers.items():
                plan = state.plans[name or "model"].weights[attribute]
                rows.append(_row(name or "model", state.plans[name or "model"].layer.op, attribute, quantizer, plan))
        elif isinstance(module, ActivationQuantizationHolder):
            layer, tensor = _place(name)
            plan = state.plans[layer].activation
            rows.append(_row(layer, state.plans[layer].layer.op, tensor, module.activation_holder_quantizer, plan))
    return Description(tuple(rows), dict(state.left_out), dict(state.folded), finalized=state.finalized)


def _place(name: str) -> tuple[str, str]:
    """Return layer and tensor of a holder's name: ``fc.input_holders.input``, ``fc.output_holder``, ``add_input_0_holder``."""
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


def _row(layer: str, op: str, tensor: str, quantizer: Any, plan: Any) -> DescriptionRow:
    config = plan.config
    trainable = isinstance(quantizer, BasePytorchTrainableQuantizer)
    params: dict[str, Any] = {}
    n_bits = config.n_bits
    if trainable:
        state = "frozen" if quantizer.freeze_quant_params else "trainable"
        if not quantizer.calibrated:
            state = "not calibrated"
        else:
            current = quantizer.current_config()
            params, n_bits = current.quantization_params, current.n_bits
    else:
        state, n_bits = "deployed", quantizer.num_bits
        params = quantizer.params
    return DescriptionRow(
        layer=layer,
        op=op,
        tensor=tensor,
        target=str(config.target),
        training_method=plan.training_method,
        method=str(config.quantization_method),
        n_bits=n_bits,
        channels_axis=config.channels_axis,
        params=params,
        state=state,
        quantizer=type(quantizer).__name__,
    )
