"""A wrapped model on disk: its recipe and plain arrays, in one file; no pickle, nothing executed.

Keras's own formats work for wrapped and finalized models too; this one needs no config of the model's layers, and is
the ``save`` and ``load`` that every backend has.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from trainable_core.documents import model as documents
from trainable_core.documents.files import as_path, read_arrays, write_arrays
from trainable_keras.keras2.engine import short_name, to_numpy
from trainable_keras.keras2.finalized import finalize
from trainable_keras.keras2.training import quantizers_of
from trainable_keras.keras2.wrapping import check_keras, parts_of, state_of, trainable_quantizers, wrap
from trainable_keras.parts import deployed_among

FORMAT = "trainable-keras2"


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
    deployed = deployed_among(parts_of(qmodel))
    header = documents.header_of(FORMAT, state_of(qmodel), quantizers_of(qmodel), deployed)
    arrays = {name: documents.storable(to_numpy(variable)) for name, variable in _variables(qmodel).items()}
    write_arrays(as_path(path), header, arrays)


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
    header, arrays = read_arrays(as_path(path), FORMAT, documents.SCHEMA_VERSION, documents.KINDS)
    check_keras(model, "load: the float model")
    qmodel = wrap(model, documents.recipe_of(path, header))
    if header["finalized"]:
        documents.place_numbers(path, trainable_quantizers(qmodel), header["inferable"])
        qmodel = finalize(qmodel)
    documents.fill(path, header, arrays, quantizers_of(qmodel), lambda: _variables(qmodel), _assign)
    return qmodel


def _variables(qmodel: Any) -> dict[str, Any]:
    return documents.by_place(qmodel.weights, short_name)


def _assign(variable: Any, value: NDArray[Any]) -> None:
    variable.assign(tf.cast(value, variable.dtype))
