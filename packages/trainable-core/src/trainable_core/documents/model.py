"""What the files of every backend's `save` and `load` share: the header, and the checks that a file fits a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pydantic

from trainable_core.constants import RANGE_MIN
from trainable_core.errors import DocumentError
from trainable_core.qparams import table_ends, variable_names
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.recipe.document import QuantizationRecipe
from trainable_core.recipe.state import WrappedState

SCHEMA_VERSION = 1
KINDS: dict[str, type] = {"recipe": dict, "frozen": list, "finalized": bool}
"""Keys that every header has, and the type of each; a backend adds its own."""
DESCRIPTION = "description"
"""Key of a header: what `describe` says of the model, so that the file can be described without the model's code."""
PLACES = "places"
"""Key of a header whose arrays are named otherwise than `describe` names weights: those names, by the latter."""
SWITCHED_OFF = "switched_off"
"""Key of a header whose model has quantizers that calibration switched off: why, by the quantizer's name."""


def header_of(
    form: str,
    state: WrappedState,
    quantizers: Mapping[str, BaseTrainableQuantizer],
    description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what every header of a model's file says; JSON-clean.

    Parameters
    ----------
    form : str
        Name of the format.
    state : WrappedState
        What the model knows about itself.
    quantizers : mapping of str to BaseTrainableQuantizer
        Its trainable quantizers by the name of their tensor.
    description : mapping, optional
        What `describe` says of the model, as a document.
    """
    header = {
        "format": form,
        "schema_version": SCHEMA_VERSION,
        "recipe": state.recipe.model_dump(mode="json", exclude_unset=True),
        "frozen": [name for name, quantizer in quantizers.items() if quantizer.freeze_quant_params],
        "finalized": state.finalized,
    }
    if description is not None:
        header[DESCRIPTION] = description
    off = {name: q.subject for name, q in quantizers.items() if not q.quantization_config.enabled}
    if off:
        header[SWITCHED_OFF] = {name: state.left_out.get(subject, "") for name, subject in off.items()}
    return header


def switch_off_quantizers(
    path: object, header: Mapping[str, Any], quantizers: Mapping[str, Any], state: WrappedState
) -> None:
    """Switch off the quantizers that calibration had switched off when a file was written, and note why.

    Raises
    ------
    DocumentError
        When the model has no quantizer of such a name; none is switched off then.
    """
    off = header.get(SWITCHED_OFF, {})
    if not isinstance(off, dict) or not all(isinstance(why, str) for why in off.values()):
        raise DocumentError(path, f"its header has a {SWITCHED_OFF!r} that does not map names to reasons")
    check_names(path, off, quantizers)
    for name, why in off.items():
        quantizers[name].switch_off()
        if why:
            state.left_out[quantizers[name].subject] = why


def recipe_of(path: object, header: Mapping[str, Any]) -> QuantizationRecipe:
    """Return the recipe of a header; DocumentError when it is damaged."""
    try:
        return QuantizationRecipe.model_validate(header["recipe"])
    except pydantic.ValidationError as error:
        raise DocumentError(path, f"its recipe is damaged: {error}") from error


def placeholder(quantizer: BaseTrainableQuantizer) -> None:
    """Give a quantizer numbers that make it convert; those of a file replace them."""
    if quantizer.computes_grid:
        return
    names, shape = variable_names(quantizer.quantization_config.quantization_method), quantizer.structure.shape
    values = quantizer.encoded({key: np.full(shape, -1.0 if key == RANGE_MIN else 1.0) for key in names})
    for width in quantizer.structure.widths:
        for key, variable in quantizer.grid_variables(width).items():
            quantizer.assign(variable, values[key])
    quantizer.calibrated = True


def place_levels(path: object, quantizer: BaseTrainableQuantizer, levels: object) -> None:
    """Give a quantizer whose levels are variables those of a file's deployed table; other quantizers have their own.

    Its sign has to be that of the file already.

    Parameters
    ----------
    path : object
        The file, for errors.
    quantizer : BaseTrainableQuantizer
        Changed in place.
    levels : array of numbers, or anything else
        What the file has.

    Raises
    ------
    DocumentError
        When these are no levels that the quantizer can have.
    """
    if not quantizer.learns_levels:
        return
    most = 2**quantizer.quantization_config.n_bits
    try:
        table = np.unique(np.asarray(levels, np.float64).reshape(-1))
    except (TypeError, ValueError):
        table = np.empty(0)
    first, last = table_ends(signed=quantizer.signed)
    fits = (table == np.rint(table)) & (table >= first) & (table <= last)
    if not 0 < table.size <= most or not fits.all():
        problem = f"the levels of its {quantizer.subject!r} are no table of at most {most} codes: {levels!r}"
        raise DocumentError(path, problem)
    levels_found = tuple(int(level) for level in table)
    for variable, value in quantizer.levels_as_variables(levels_found, signed=quantizer.signed):
        quantizer.assign(variable, value)


def check_shapes(path: object, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file whose variables are not those of a model.

    Parameters
    ----------
    path : object
        The file, for errors.
    wanted, found : mapping of str to tuple of int
        Shapes of the model's variables and of the file's, by name.

    Raises
    ------
    DocumentError
        Names what is missing, unknown, or of another shape.
    """
    missing, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or foreign:
        raise DocumentError(
            path,
            f"it is for another architecture; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(foreign) or 'none'}",
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise DocumentError(path, f"{name!r} has shape {found[name]}, this model's has {shape}")


def freeze_quantizers(path: object, names: Iterable[str], quantizers: Mapping[str, Any]) -> None:
    """Freeze the quantizers that a file says are frozen.

    Raises
    ------
    DocumentError
        When the model has no quantizer of such a name; none is frozen then.
    """
    check_names(path, names, quantizers)
    for name in names:
        quantizers[name].freeze()


def check_names(path: object, names: Iterable[str], quantizers: Mapping[str, Any]) -> None:
    """Refuse names of quantizers that a model doesn't have; DocumentError names the first."""
    for name in names:
        if name not in quantizers:
            raise DocumentError(path, f"it has a quantizer {name!r}, which this model doesn't have")
