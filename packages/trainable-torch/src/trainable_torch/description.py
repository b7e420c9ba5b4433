"""What of a model is quantized, how, with which numbers; and what is not, and why."""

from __future__ import annotations

from torch import nn

from trainable_core.backend.description import Description, describe_quantizer
from trainable_torch.bias import BiasQuantizer
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.operations import CONTAINER
from trainable_torch.ranks import require_whole
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
        Prints as a table; `to_dict` and `to_json` give the same as a document. Once some quantized weight was read in
        a forward, in calibration for instance, those that were not are listed among what is left out.

    Raises
    ------
    ModelError
        When the model is not wrapped, or sharded over ranks.
    """
    state = state_of(qmodel)
    require_whole(qmodel, "describe")
    rows = []
    unread: dict[str, bool] = {}
    float_biases: dict[str, str] = {}
    for name, module in qmodel.named_modules():
        if isinstance(module, BiasQuantizer) and module.is_switched_off:
            float_biases[module.subject] = (
                "it stays float: the quantizer of the layer's input or weight is switched off"
            )
        if isinstance(module, QuantizationWrapper):
            unread |= {f"{name or 'model'}.{attribute}": not read for attribute, read in module.weights_read.items()}
            for attribute, quantizer in module.weights_quantizers.items():
                plan = state.plans[name or "model"]
                rows.append(describe_quantizer(plan.layer, attribute, plan.weights[attribute], quantizer))
        elif isinstance(module, ActivationQuantizationHolder):
            layer, tensor = place_of_holder(name.removeprefix(f"{CONTAINER}."))
            plan = state.plans[layer]
            of_tensor = plan.float_inputs if plan.integer and tensor != "output" else plan.activation
            assert of_tensor is not None  # noqa: S101 - there is a holder, so there was a plan for it
            rows.append(describe_quantizer(plan.layer, tensor, of_tensor, module.activation_holder_quantizer))
    left_out = state.left_out | float_biases
    if not all(unread.values()):  # the model has run, by forwards that are not compiled
        left_out |= {name: "no forward has read this weight so far" for name, never in unread.items() if never}
    biases = {bias: source for bias, source in state.biases.items() if bias not in float_biases}
    return Description(
        tuple(rows), left_out, dict(state.folded), state.finalized, biases=biases, islands=dict(state.islands)
    )


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
