"""From a trained model to the deployed one."""

from __future__ import annotations

import torch
from torch import nn

from trainable_core.backend.building import require_calibrated
from trainable_torch.copying import copied
from trainable_torch.holder import ActivationQuantizationHolder
from trainable_torch.ranks import require_whole
from trainable_torch.reading import MARK, ORIGIN
from trainable_torch.state import STATE, present_state, state_of
from trainable_torch.structure.folding import fold_quantized, take_over
from trainable_torch.training import quantizers_of
from trainable_torch.wrapper import QuantizationWrapper, check_biases
from trainable_torch.wrapping import count_step


def finalize(qmodel: nn.Module) -> nn.Module:
    """Return a new model with inferable quantizers, which gives bit for bit what `qmodel` gives in eval mode.

    Parameters
    ----------
    qmodel : Module
        A wrapped, calibrated model; left as it is, and still trains.

    Returns
    -------
    Module
        In eval mode, with mctq's inferable quantizers in wrappers and holders. Of a finalized model a copy is returned.

    Raises
    ------
    ModelError
        When the model is not wrapped, or sharded over ranks.
    QuantizerStateError
        When a quantizer has no numbers yet; names the layers.
    IntegerRangeError
        When int32 does not hold the code of a bias; names the layer.
    """
    state_of(qmodel)
    require_whole(qmodel, "finalize")
    quantizers = quantizers_of(qmodel)
    require_calibrated(quantizers.values(), type(qmodel).__name__, "trainable_torch")
    check_biases(qmodel)
    return converted(qmodel)


def converted(qmodel: nn.Module) -> nn.Module:
    """Return what `finalize` returns, whatever the biases are: `load` fills them in later."""
    deployed = copied(qmodel).eval()
    take_over(deployed, [module for module in deployed.modules() if isinstance(module, QuantizationWrapper)])
    _store_values(deployed)
    folded = _fold(deployed)
    inferable = {
        id(q): q.convert2inferable() for q in quantizers_of(deployed).values() if q.quantization_config.enabled
    }
    for module in list(deployed.modules()):  # a quantizer that tied weights share stays shared
        if isinstance(module, QuantizationWrapper):
            for attribute, quantizer in module.weights_quantizers.items():
                module.weights_quantizers[attribute] = inferable.get(id(quantizer), quantizer)
        elif isinstance(module, ActivationQuantizationHolder):
            quantizer = module.activation_holder_quantizer
            module.activation_holder_quantizer = inferable.get(id(quantizer), quantizer)
    for key, hook in list(deployed._forward_pre_hooks.items()):  # noqa: SLF001 - there is no public way to find a hook
        if hook is count_step:
            del deployed._forward_pre_hooks[key]  # noqa: SLF001
    for module in deployed.modules():
        for state in (vars(module).get(STATE), getattr(vars(module).get(MARK), "state", None)):
            if state is not None:
                state.finalized = True
                state.note_folded(folded)
    state_of(deployed).finalized = True
    return deployed


@torch.no_grad()
def _fold(deployed: nn.Module) -> dict[str, str]:
    """Fold the batch norms that were to be folded after training; return why, by name, what was not.

    Names are those from when the model was wrapped, and those that modules have now.
    """
    kept: dict[str, str] = {}
    for name, into in present_state(deployed).foldable.items():
        norm, layer = deployed.get_submodule(name), deployed.get_submodule(into)
        if isinstance(norm, nn.Identity):  # the layer has taken over what training simulated
            continue
        quantizer = (
            layer.weights_quantizers["weight"]
            if isinstance(layer, QuantizationWrapper) and len(layer.weights_quantizers)
            else None
        )
        if quantizer is not None and not quantizer.quantization_config.enabled:
            quantizer = None
        reason = "" if quantizer is None or not quantizer.deploys_itself else "the quantizer converts itself"
        reason = reason or fold_quantized(layer, norm, quantizer)
        if reason:
            kept |= {name: reason, vars(norm)[ORIGIN]: reason}
    return kept


@torch.no_grad()
def _store_values(deployed: nn.Module) -> None:
    """Put the quantized values in the place of float weights whose method deploys these; see `deploys_values`."""
    wrappers = [module for module in deployed.modules() if isinstance(module, QuantizationWrapper)]
    weights = {id(w): (w, q) for wrapper in wrappers for _, w, q in wrapper.get_weights_vars()}  # tied weights once
    for weight, quantizer in weights.values():
        if getattr(quantizer, "deploys_values", False) and quantizer.quantization_config.enabled:  # not inferable yet
            weight.copy_(quantizer(weight, training=False))
