"""The framework-free part of a Keras backend's ``save`` and ``load``: the header, and what fits what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from trainable_core.constants import RANGE_MIN, SIGNED
from trainable_core.errors import DocumentError
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.plan import WrappedState

SCHEMA_VERSION = 1
KINDS: dict[str, type] = {"recipe": dict, "signs": dict, "frozen": list, "deployed": dict, "finalized": bool}
"""Keys of a header, and the type of each."""


def header_of(
    form: str, state: WrappedState, quantizers: Mapping[str, BaseTrainableQuantizer], deployed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the header of a model's file.

    Parameters
    ----------
    form : str
        Name of the format.
    state : WrappedState
        What the model knows of itself.
    quantizers : mapping of str to BaseTrainableQuantizer
        Its trainable quantizers by the name of their tensor.
    deployed : mapping of str to quantizer
        Its inferable quantizers by the name of their tensor.
    """
    return {
        "format": form,
        "schema_version": SCHEMA_VERSION,
        "recipe": state.recipe.model_dump(mode="json", exclude_unset=True),
        "signs": {name: q.signed for name, q in quantizers.items() if q.stores_sign},
        "frozen": [name for name, quantizer in quantizers.items() if quantizer.freeze_quant_params],
        "deployed": {name: quantizer.get_config() for name, quantizer in deployed.items()},
        "finalized": state.finalized,
    }


def recipe_of(path: object, header: Mapping[str, Any]) -> QuantizationRecipe:
    """Return the recipe of a header; DocumentError when it is damaged."""
    try:
        return QuantizationRecipe.model_validate(header["recipe"])
    except pydantic.ValidationError as error:
        raise DocumentError(path, f"its recipe is damaged: {error}") from error


def place_numbers(path: object, quantizers: Iterable[BaseTrainableQuantizer], deployed: Mapping[str, Any]) -> None:
    """Give quantizers some numbers of the right width and sign so that they convert; a file's replace them.

    Raises
    ------
    DocumentError
        When the file has no deployed quantizer of that name, or one of a width that the quantizer has no grid for.
    """
    for quantizer in quantizers:
        if not quantizer.quantization_config.enabled:
            continue
        if quantizer.subject not in deployed:
            raise DocumentError(path, f"it has no quantizer {quantizer.subject!r}, which this model has")
        config = deployed[quantizer.subject]
        if config.get("num_bits") not in quantizer.structure.widths:
            problem = f"its {quantizer.subject!r} has {config.get('num_bits')!r} bits, this model's has "
            raise DocumentError(path, problem + " or ".join(map(str, quantizer.structure.widths)))
        signed = bool(config.get(SIGNED, config.get("signed", quantizer.signed)))
        for width in quantizer.structure.widths:
            for key, variable in quantizer.grid_variables(width).items():
                value = np.full(tuple(variable.shape), -1.0 if key == RANGE_MIN else 1.0, np.float32)
                quantizer.assign(variable, value)
        quantizer.select_width(config["num_bits"])
        quantizer.signed = signed
        quantizer.calibrated = True


def check_arrays(path: object, wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse arrays that are not a model's.

    Parameters
    ----------
    path : object
        The file, for errors.
    wanted : mapping of str to tuple of int
        Shapes of the model's variables.
    arrays : mapping of str to array
        What the file has.

    Raises
    ------
    DocumentError
        Names what is missing, unknown, or of another shape.
    """
    missing, foreign = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or foreign:
        raise DocumentError(
            path,
            f"it is for another architecture; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(foreign) or 'none'}",
        )
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise DocumentError(path, f"{name!r} has shape {arrays[name].shape}, this model's has {shape}")


def check_quantizers(path: object, header: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a header that names quantizers which a model doesn't have; DocumentError names the first."""
    names = set(known)
    for name in [*header["signs"], *header["frozen"]]:
        if name not in names:
            raise DocumentError(path, f"it has a quantizer {name!r}, which this model doesn't have")


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
        The model's trainable quantizers by the name of their tensor.
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
    check_quantizers(path, header, quantizers)
    for name in header["frozen"]:
        quantizers[name].freeze()
    wanted = variables_of()
    check_arrays(path, {name: tuple(variable.shape) for name, variable in wanted.items()}, arrays)
    for name, variable in wanted.items():
        assign(variable, arrays[name])
    for name, sign in header["signs"].items():
        quantizers[name].signed = bool(sign)
    for quantizer in quantizers.values():
        grid = [variable for width in quantizer.widths for variable in quantizer.grid_variables(width).values()]
        quantizer.calibrated = not any(np.isnan(quantizer.to_numpy(variable)).all() for variable in grid)


def by_place(variables: Iterable[Any], name_of: Callable[[Any], str]) -> dict[str, Any]:
    """Return variables by their place in the model's order, and what they are called."""
    return {f"{index}:{name_of(variable)}": variable for index, variable in enumerate(variables)}


def storable(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that a ``.npy`` file can hold: bfloat16, which NumPy lacks, as float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
