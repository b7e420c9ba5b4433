"""A wrapped model on disk: its recipe and plain arrays, in one file; no pickle, nothing executed.

Keras's own formats work for wrapped and finalized models too; this one needs no config of the model's layers, and is
the ``save`` and ``load`` that every backend has.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from trainable_core.documents.files import as_path, read_arrays, write_arrays
from trainable_core.documents.model import SCHEMA_VERSION, recipe_of
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_keras import documents
from trainable_keras.finalized import finalize
from trainable_keras.framework import Framework
from trainable_keras.parts import KerasWrapper, holders_of
from trainable_keras.training import quantizers_of
from trainable_keras.wrapping import parts_of, state_of, trainable_quantizers, wrap


def save(framework: Framework, qmodel: Any, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model; see `trainable_keras.save`."""
    state, quantizers = state_of(framework, qmodel), quantizers_of(qmodel)
    header = documents.header_of(framework.file_format, state, quantizers, _inferable_among(parts_of(qmodel)))
    variables = _variables(framework, qmodel)
    arrays = {name: documents.storable(framework.functions.to_numpy(variable)) for name, variable in variables.items()}
    write_arrays(as_path(path), header, arrays)


def load(framework: Framework, path: str | PathLike[str], model: Any) -> Any:
    """Return a wrapped model as it was saved; see `trainable_keras.load`."""
    header, arrays = read_arrays(as_path(path), framework.file_format, SCHEMA_VERSION, documents.KINDS)
    qmodel = wrap(framework, model, recipe_of(path, header))
    if header["finalized"]:
        documents.place_numbers(path, trainable_quantizers(qmodel), header["inferable"])
        qmodel = finalize(framework, qmodel)
    quantizers = quantizers_of(qmodel)
    documents.fill(path, header, arrays, quantizers, lambda: _variables(framework, qmodel), framework.assign)
    return qmodel


def _variables(framework: Framework, qmodel: Any) -> dict[str, Any]:
    return documents.by_place(framework.variables(qmodel), framework.variable_name)


def _inferable_among(parts: Sequence[Any]) -> dict[str, Any]:
    """Return the inferable quantizers of a model's parts by the name of their tensor."""
    found: dict[str, Any] = {}
    for part in parts:
        assert part.plan is not None  # noqa: S101 - `wrap` puts a plan on every part
        name = part.plan.layer.name
        if isinstance(part, KerasWrapper):
            found |= {f"{name}.{attribute}": q for attribute, q in part.weights_quantizers.items()}
        found |= {f"{name}: {holder.tensor}": holder.activation_holder_quantizer for holder in holders_of(part)}
    return {name: q for name, q in found.items() if not isinstance(q, BaseTrainableQuantizer)}
