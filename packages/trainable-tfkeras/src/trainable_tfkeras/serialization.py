"""A wrapped model on disk: its recipe and plain arrays, in one file; no pickle, nothing executed.

Keras's own formats work for wrapped and finalized models too; this one needs no config of the model's layers, and is
the ``save`` and ``load`` that every backend has.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from trainable_core import model_file
from trainable_core.model_document import read_arrays, write_arrays
from trainable_core.model_file import SCHEMA_VERSION
from trainable_tfkeras.engine import to_numpy
from trainable_tfkeras.finalized import finalize
from trainable_tfkeras.quantizers.base import BaseKerasTrainableQuantizer
from trainable_tfkeras.training import quantizers_of
from trainable_tfkeras.wrapper import QuantizationWrapper
from trainable_tfkeras.wrapping import check_keras, parts_of, state_of, trainable_quantizers, wrap

FORMAT = "trainable-tfkeras"


def save(qmodel: Any, path: str | PathLike[str]) -> None:
    """Write a wrapped or finalized model.

    Parameters
    ----------
    qmodel : tf.keras.Model
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
    header = model_file.header_of(FORMAT, state_of(qmodel), quantizers_of(qmodel), _deployed(qmodel))
    write_arrays(Path(path), header, {name: _array(variable) for name, variable in _variables(qmodel).items()})


def load(path: str | PathLike[str], model: Any) -> Any:
    """Return a wrapped model as it was saved: training resumes bit for bit.

    Parameters
    ----------
    path : path
        What `save` wrote.
    model : tf.keras.Model
        A float model of the same architecture, built; left untouched, its values don't matter.

    Returns
    -------
    tf.keras.Model
        Wrapped, or finalized if that is what was saved.

    Raises
    ------
    DocumentError
        When the file is missing, truncated, damaged, of another format, or for another architecture.
    DocumentVersionError
        When it was written in a version of the format that this release doesn't know.
    ModelError
        When `model` is no Keras 2 model.
    """
    header, arrays = read_arrays(Path(path), FORMAT, SCHEMA_VERSION, model_file.KINDS)
    check_keras(model, "load: the float model")
    qmodel = wrap(model, model_file.recipe_of(path, header))
    if header["finalized"]:
        model_file.place_numbers(path, trainable_quantizers(qmodel), header["deployed"])
        qmodel = finalize(qmodel)
    quantizers = quantizers_of(qmodel)
    model_file.check_quantizers(path, header, quantizers)
    for name in header["frozen"]:
        quantizers[name].freeze()
    wanted = _variables(qmodel)
    model_file.check_arrays(path, {name: tuple(each.shape) for name, each in wanted.items()}, arrays)
    for name, variable in wanted.items():
        variable.assign(tf.cast(arrays[name], variable.dtype))
    for name, sign in header["signs"].items():
        quantizers[name].signed = bool(sign)
    for quantizer in quantizers.values():
        quantizer.calibrated = False  # asks the variables
    return qmodel


def _variables(qmodel: Any) -> dict[str, Any]:
    """Return the variables by their place in the model's order, and what they are called."""
    names = [str(variable.name).rpartition("/")[2].partition(":")[0] for variable in qmodel.weights]
    return {f"{index}:{name}": each for index, (name, each) in enumerate(zip(names, qmodel.weights, strict=True))}


def _array(variable: Any) -> NDArray[Any]:
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
