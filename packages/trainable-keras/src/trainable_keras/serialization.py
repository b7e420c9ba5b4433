"""A wrapped model on disk: its recipe and plain arrays, in one file; no pickle, nothing executed.

Keras's own ``.keras`` format works for wrapped and finalized models too; this one needs no config of the model's
layers, and is the ``save`` and ``load`` that every backend has.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pydantic
from numpy.typing import NDArray

from trainable_core.constants import RANGE_MIN, SIGNED
from trainable_core.errors import DocumentError
from trainable_core.model_document import read_arrays, write_arrays
from trainable_core.recipe import QuantizationRecipe
from trainable_keras.engine import to_numpy
from trainable_keras.finalized import finalize
from trainable_keras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_keras.training import quantizers_of
from trainable_keras.wrapper import QuantizationWrapper
from trainable_keras.wrapping import check_keras, parts_of, state_of, trainable_quantizers, wrap

FORMAT = "trainable-keras"
SCHEMA_VERSION = 1


def save(qmodel: Any, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model.

    Parameters
    ----------
    qmodel : keras.Model
        What `wrap` or `finalize` returned.
    path : path
        File to write; an old one is replaced only once the new one is complete on disk.

    Raises
    ------
    ModelError
        When the model is not wrapped.
    DocumentError
        When the file can't be written.

    Notes
    -----
    A zip of ``.npy`` files: the variables in the model's order, bfloat16 ones as float32, and a document with the
    recipe, the signs that calibration decided, which quantizers are frozen, and the version of this format. The
    optimizer's variables are Keras's business: ``.keras`` has them.
    """
    state = state_of(qmodel)
    quantizers = quantizers_of(qmodel)
    header = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "recipe": state.recipe.model_dump(mode="json", exclude_unset=True),
        "signs": {name: q.signed for name, q in quantizers.items() if q.stores_sign},
        "frozen": [name for name, quantizer in quantizers.items() if quantizer.freeze_quant_params],
        "deployed": {name: q.get_config() for name, q in _deployed(qmodel).items()},
        "finalized": state.finalized,
    }
    write_arrays(Path(path), header, {name: _array(variable) for name, variable in _variables(qmodel).items()})


def load(path: str | PathLike[str], model: Any) -> Any:
    """Return a wrapped model as it was saved: training resumes bit for bit.

    Parameters
    ----------
    path : path
        What `save` wrote.
    model : keras.Model
        A float model of the same architecture, built; left untouched, its values don't matter.

    Returns
    -------
    keras.Model
        Wrapped, or finalized if that is what was saved.

    Raises
    ------
    DocumentError
        When the file is missing, truncated, damaged, of another format, or for another architecture.
    DocumentVersionError
        When it was written in a version of the format that this release doesn't know.
    ModelError
        When `model` is no Keras 3 model.
    """
    kinds = {"recipe": dict, "signs": dict, "frozen": list, "deployed": dict, "finalized": bool}
    header, arrays = read_arrays(Path(path), FORMAT, SCHEMA_VERSION, kinds)
    check_keras(model, "load: the float model")
    try:
        qmodel = wrap(model, QuantizationRecipe.model_validate(header["recipe"]))
    except pydantic.ValidationError as error:
        raise DocumentError(path, f"its recipe is damaged: {error}") from error
    if header["finalized"]:
        _place_holders(path, qmodel, header["deployed"])
        qmodel = finalize(qmodel)
    _fill(path, qmodel, arrays)
    quantizers = quantizers_of(qmodel)
    for name in [*header["signs"], *header["frozen"]]:
        if name not in quantizers:
            raise DocumentError(path, f"it has a quantizer {name!r}, which this model doesn't have")
    for name, sign in header["signs"].items():
        quantizers[name].signed = bool(sign)
    for name in header["frozen"]:
        quantizers[name].freeze()
    for quantizer in quantizers.values():
        grid = [variable for width in quantizer.widths for variable in quantizer.grid_variables(width).values()]
        quantizer.calibrated = not any(np.isnan(to_numpy(variable)).all() for variable in grid)
    return qmodel


def _variables(qmodel: Any) -> dict[str, keras.Variable]:
    """Return the variables by their place in the model's order, and what they are called."""
    return {f"{index}:{variable.name}": variable for index, variable in enumerate(qmodel.variables)}


def _array(variable: keras.Variable) -> NDArray[Any]:
    array = to_numpy(variable)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _deployed(qmodel: Any) -> dict[str, Any]:
    """Return a finalized model's quantizers by the name of their tensor."""
    found = {}
    for part in parts_of(qmodel):
        plan, holders = part.plan, [part]
        assert plan is not None  # noqa: S101 - `wrap` puts a plan on every part
        if isinstance(part, QuantizationWrapper):
            holders = part.holders
            for attribute, quantizer in part.weights_quantizers.items():
                found[f"{plan.layer.name}.{attribute}"] = quantizer
        for holder in holders:
            found[f"{plan.layer.name}: {holder.tensor}"] = holder.activation_holder_quantizer
    return {name: q for name, q in found.items() if not isinstance(q, BaseKerasTrainableQuantizer)}


def _place_holders(path: Any, qmodel: Any, deployed: dict[str, Any]) -> None:
    """Give quantizers some numbers of the right width and sign so that they convert; the file's replace them."""
    for quantizer in trainable_quantizers(qmodel):
        if not quantizer.quantization_config.enabled:
            continue
        if quantizer.subject not in deployed:
            raise DocumentError(path, f"it has no quantizer {quantizer.subject!r}, which this model has")
        config = deployed[quantizer.subject]
        for width in quantizer.widths:
            for key, variable in quantizer.grid_variables(width).items():
                quantizer.assign(
                    variable, np.full(tuple(variable.shape), -1.0 if key == RANGE_MIN else 1.0, np.float32)
                )
        if hasattr(quantizer, "logits"):
            chosen = [float(width == config["num_bits"]) for width in quantizer.widths]
            quantizer.assign(quantizer.get_quantizer_variable("logits"), np.asarray(chosen, np.float32))
        quantizer.signed = bool(config.get(SIGNED, config.get("signed", quantizer.signed)))
        quantizer.calibrated = True


def _fill(path: Any, qmodel: Any, arrays: dict[str, NDArray[Any]]) -> None:
    wanted = _variables(qmodel)
    missing, foreign = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or foreign:
        raise DocumentError(
            path,
            f"it is for another architecture; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(foreign) or 'none'}",
        )
    for name, variable in wanted.items():
        if arrays[name].shape != tuple(variable.shape):
            shapes = f"{arrays[name].shape}, this model's has {tuple(variable.shape)}"
            raise DocumentError(path, f"{name!r} has shape {shapes}")
    for name, variable in wanted.items():
        variable.assign(arrays[name])
