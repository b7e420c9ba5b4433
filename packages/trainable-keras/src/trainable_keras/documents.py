"""What the files of `save` and `load` hold beyond what every backend's do, whichever Keras it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainable_core.constants import LUT_VALUES, SIGNED
from trainable_core.documents import model
from trainable_core.errors import DocumentError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.state import WrappedState

KINDS: dict[str, type] = {**model.KINDS, "signs": dict, "inferable": dict, "layers": list}
"""Keys of a header, and the type of each."""

NAMES = "names"
"""Key of a model's structure: the names by which a recipe's rules mean its layers, in the model's order."""


def header_of(
    form: str,
    state: WrappedState,
    quantizers: Mapping[str, BaseTrainableQuantizer],
    inferable: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header of a model's file.

    Parameters
    ----------
    form : str
        Name of the format.
    state : WrappedState
        What the model knows about itself.
    quantizers : mapping of str to BaseTrainableQuantizer
        Its trainable quantizers by their place.
    inferable : mapping of str to quantizer
        Its inferable quantizers by their place.
    description : mapping, optional
        What `describe` says of the model, as a document.
    """
    return {
        **model.header_of(form, state, quantizers, description),
        "layers": list(state.structure.get(NAMES, state.plans)),
        "signs": {name: q.signed for name, q in quantizers.items() if q.stores_sign},
        "inferable": {name: quantizer.get_config() for name, quantizer in inferable.items()},
    }


def place_numbers(path: object, quantizers: Mapping[str, BaseTrainableQuantizer], inferable: Mapping[str, Any]) -> None:
    """Give quantizers some numbers of the right width and sign so that they convert; a file's replace them.

    Quantizers go by their place on both sides.

    Raises
    ------
    DocumentError
        When the file has no inferable quantizer of that name, or one of a width that the quantizer has no grid for.
    """
    for place, quantizer in quantizers.items():
        if not quantizer.quantization_config.enabled:
            continue
        if place not in inferable:
            raise DocumentError(path, f"it has no quantizer {quantizer.subject!r}, which this model has")
        config = inferable[place]
        if config.get("num_bits") not in quantizer.structure.widths:
            problem = f"its {quantizer.subject!r} has {config.get('num_bits')!r} bits, this model's has "
            raise DocumentError(path, problem + " or ".join(map(str, quantizer.structure.widths)))
        signed = bool(config.get(SIGNED, config.get("signed", quantizer.signed)))
        model.placeholder(quantizer)
        quantizer.signed = signed
        model.place_levels(path, quantizer, config.get(LUT_VALUES))
        quantizer.select_width(config["num_bits"])


def fill(
    path: object,
    header: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    quantizers: Mapping[str, Any],
    variables_of: Callable[[], Mapping[str, Any]],
    assign: Callable[[Any, NDArray[Any]], None],
) -> None:
    """Give a model that was made by a file's recipe what the file holds.

    Parameters
    ----------
    path : object
        The file, for errors.
    header, arrays : mapping
        What it holds.
    quantizers : mapping of str to BaseTrainableQuantizer
        The model's trainable quantizers by their place.
    variables_of : callable
        Returns the model's variables by name; asked when the quantizers that the file freezes are frozen, because some
        Keras lists frozen variables elsewhere.
    assign : callable
        Sets a variable.

    Raises
    ------
    DocumentError
        When the file is for another architecture, or names quantizers that the model doesn't have.
    """
    model.check_names(path, header["signs"], quantizers)
    model.freeze_quantizers(path, header["frozen"], quantizers)
    wanted = variables_of()
    found = {name: array.shape for name, array in arrays.items()}
    shapes = {name: _expected(tuple(variable.shape), found.get(name, ())) for name, variable in wanted.items()}
    model.check_shapes(path, shapes, found)
    for name, variable in wanted.items():
        assign(variable, arrays[name])
    for name, sign in header["signs"].items():
        quantizers[name].signed = bool(sign)
    for quantizer in quantizers.values():
        grid = [v for width in quantizer.structure.widths for v in quantizer.grid_variables(width).values()]
        quantizer.calibrated = not any(np.isnan(quantizer.to_numpy(variable)).all() for variable in grid)


def _expected(shape: tuple[int | None, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a file's array must have: an adapted layer of Keras 2 leaves some dimensions open."""
    open_to = (*found, *(0 for _ in shape))
    return tuple(size if known is None else known for known, size in zip(shape, open_to, strict=False))


def by_place(values: Sequence[Any], name_of: Callable[[Any], str]) -> dict[str, Any]:
    """Return variables or quantizers by their place in the model's order, and what they are called.

    Numbers at the end of a name are left out: Keras may have given them, by what was made before in the process.
    """
    names = (re.sub(r"[_\d]+$", "", name_of(value)) for value in values)
    return {f"{index}:{name}": value for (index, value), name in zip(enumerate(values), names, strict=True)}


def storable(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that a ``.npy`` file can hold: bfloat16, which NumPy lacks, as float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
