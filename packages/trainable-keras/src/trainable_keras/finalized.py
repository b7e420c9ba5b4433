"""From a trained model to the deployed one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trainable_core.backend.building import require_calibrated
from trainable_keras.batch_norm import Simulated
from trainable_keras.copying import copy_model
from trainable_keras.folding import fold_quantized, named_layers
from trainable_keras.framework import Framework
from trainable_keras.graph import layers_within
from trainable_keras.parts import KerasWrapper, check_biases
from trainable_keras.wrapping import note, parts_of, state_of, trainable_quantizers

FOLDED = "folded after training"
"""Key of a finalized model's structure: whether each batch norm was folded that was to be, in the model's order."""


def finalize(framework: Framework, qmodel: Any, folded: Sequence[bool] | None = None) -> Any:
    """Return a new model with inferable quantizers; see `trainable_keras.finalize`.

    Parameters
    ----------
    framework : Framework
        The model's Keras.
    qmodel : keras.Model
        A wrapped model.
    folded : sequence of bool, optional
        Which of the batch norms that are to be folded after training were, in a model whose variables are filled in
        later; by default it is found out.
    """
    state = state_of(framework, qmodel)
    require_calibrated(trainable_quantizers(qmodel), type(qmodel).__name__, "trainable_keras")
    check_biases(parts_of(qmodel), framework.functions.to_numpy)
    deployed = copy_model(framework, qmodel)
    with framework.strategy_of(qmodel):
        if state.simulates:
            _take_over(framework, deployed)
        _store_values(framework, parts_of(deployed))
        kept = _fold(framework, deployed, state.foldable, folded)
        for part in parts_of(deployed):
            part.convert_to_inferable_quantizers()
    told = (
        {**state.structure, FOLDED: [norm not in kept for norm in state.foldable]}
        if state.foldable
        else state.structure
    )
    deployed_state = replace(
        state, finalized=True, folded={**state.folded}, left_out={**state.left_out}, structure=told
    )
    deployed_state.note_folded(kept)
    note(framework, deployed, deployed_state)
    return deployed


def _take_over(framework: Framework, deployed: Any) -> None:
    """Fold the batch norms whose folding was simulated."""
    for part in parts_of(deployed):
        if isinstance(part, KerasWrapper):
            part.take_over(framework.assign)
    for layer in layers_within(deployed):
        if isinstance(layer, Simulated):
            framework.kit.pass_on(layer)


def _fold(
    framework: Framework, deployed: Any, foldable: Mapping[str, str], known: Sequence[bool] | None
) -> dict[str, str]:
    """Fold the batch norms that were to be folded after training; return why, by name, what was not."""
    if not foldable:
        return {}
    layers = dict(named_layers(framework, deployed))
    kept = {}
    for index, (name, into) in enumerate(foldable.items()):
        if isinstance(layers[name], framework.passing):  # the layer has taken over what training simulated
            reason = ""
        elif known is None:
            reason = fold_quantized(framework, layers[into], layers[name])
        elif known[index]:
            framework.kit.pass_on(layers[name])
            reason = ""
        else:
            reason = "it was not folded when the model was finalized"
        if reason:
            kept[name] = reason
    return kept


def _store_values(framework: Framework, parts: Iterable[Any]) -> None:
    """Put the quantized values in the place of float weights whose method deploys these; see `deploys_values`."""
    wrappers = [part for part in parts if isinstance(part, KerasWrapper)]
    weights = {id(w): (w, q) for wrapper in wrappers for _, w, q in wrapper.get_weights_vars()}  # shared weights once
    for weight, quantizer in weights.values():
        if getattr(quantizer, "deploys_values", False) and quantizer.quantization_config.enabled:  # not inferable yet
            values = quantizer(framework.functions.read(weight), training=False)
            framework.assign(weight, framework.functions.to_numpy(values))
