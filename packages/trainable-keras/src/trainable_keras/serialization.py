"""A wrapped model on disk: its recipe and plain arrays, in one file; no pickle, nothing executed.

Keras's own formats work for wrapped and finalized models too; this one needs no config of the model's layers, and is
the ``save`` and ``load`` that every backend has.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from trainable_core.documents.files import as_path, read_arrays, write_arrays
from trainable_core.documents.model import PLACES, SCHEMA_VERSION, recipe_of, switch_off_quantizers
from trainable_core.errors import DocumentError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.state import WrappedState
from trainable_keras import documents
from trainable_keras.batch_norm import freeze, is_frozen
from trainable_keras.description import describe
from trainable_keras.finalized import FOLDED, finalize
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasWrapper, holders_of, plan_of, told_of
from trainable_keras.statistics import simulated_batch_norms
from trainable_keras.wrapping import Names, parts_of, state_of, wrap

FROZEN_NORMS = "frozen_norms"
"""Key of a header: which simulated batch norms use their moving statistics in training too, by their number."""


def save(framework: Framework, qmodel: Any, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model; see `trainable_keras.save`."""
    state, quantizers = state_of(framework, qmodel), _quantizers(qmodel)
    inferable, told = _quantizers(qmodel, trainable=False), describe(framework, qmodel).summary().to_dict()
    header = documents.header_of(framework.file_format, state, quantizers, inferable, told)
    if FOLDED in state.structure:
        header[FOLDED] = state.structure[FOLDED]
    if frozen := [index for index, norm in enumerate(simulated_batch_norms(qmodel)) if is_frozen(norm)]:
        header[FROZEN_NORMS] = frozen
    variables = _variables(framework, qmodel)
    places = {id(variable): place for place, variable in variables.items()}
    header[PLACES] = {
        f"{plan_of(part).layer.name}.{attribute}": places[id(weight)]
        for part in parts_of(qmodel)
        if isinstance(part, KerasWrapper)
        for attribute, weight, _ in part.get_weights_vars()
        if id(weight) in places
    }
    arrays = {name: documents.storable(framework.functions.to_numpy(variable)) for name, variable in variables.items()}
    write_arrays(as_path(path), header, arrays)


def load(framework: Framework, path: str | PathLike[str], model: Any) -> Any:
    """Return a wrapped model as it was saved; see `trainable_keras.load`."""
    header, arrays = read_arrays(as_path(path), framework.file_format, SCHEMA_VERSION, documents.KINDS)
    qmodel = wrap(framework, model, recipe_of(path, header), Names(path, header["layers"]))
    switch_off_quantizers(path, header, _quantizers(qmodel), state_of(framework, qmodel))
    if header["finalized"]:
        documents.place_numbers(path, _quantizers(qmodel), header["inferable"])
        qmodel = finalize(framework, qmodel, _which_folded(path, header, state_of(framework, qmodel)))
    norms, frozen = simulated_batch_norms(qmodel), header.get(FROZEN_NORMS, [])
    if not isinstance(frozen, list) or any(type(each) is not int or not 0 <= each < len(norms) for each in frozen):
        raise DocumentError(path, f"its header has {FROZEN_NORMS!r} that this model does not have")
    for index in frozen:
        freeze(norms[index], frozen=True)
    quantizers = _quantizers(qmodel)
    documents.fill(path, header, arrays, quantizers, lambda: _variables(framework, qmodel), framework.assign)
    return qmodel


def _which_folded(path: object, header: Mapping[str, Any], state: WrappedState) -> list[bool] | None:
    """Return which batch norms of a finalized model were folded after training; None where none was to be."""
    if not state.foldable:
        return None
    folded = header.get(FOLDED)
    if not isinstance(folded, list) or len(folded) != len(state.foldable) or not all(type(x) is bool for x in folded):
        raise DocumentError(path, f"its header does not say which of {len(state.foldable)} batch norms were folded")
    return folded


def _variables(framework: Framework, qmodel: Any) -> dict[str, Any]:
    return documents.by_place(framework.variables(qmodel), framework.variable_name)


def _quantizers(qmodel: Any, *, trainable: bool = True) -> dict[str, Any]:
    """Return a model's trainable quantizers, or its inferable ones, by their place among all."""
    found: list[tuple[str, Any]] = []
    for part in parts_of(qmodel):
        if isinstance(part, KerasWrapper):
            found += part.weights_quantizers.items()
        found += [(told_of(holder).tensor, holder.activation_holder_quantizer) for holder in holders_of(part)]
    places = documents.by_place(found, lambda item: str(item[0]).rpartition(".")[2])
    return {place: q for place, (_, q) in places.items() if isinstance(q, BaseTrainableQuantizer) is trainable}
