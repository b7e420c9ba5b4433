"""The libraries that targets need, imported when they are used; none of them is a dependency of trainable-core."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from trainable_core.errors import MissingLibraryError


def library(name: str, purpose: str, extra: str = "trainable-core[onnx]") -> Any:
    """Return an installed library's module.

    Parameters
    ----------
    name : str
        Name of the module.
    purpose : str
        What needs it, for the error.
    extra : str
        What is to be installed: a distribution of this project with the extra that brings it.

    Raises
    ------
    MissingLibraryError
        When it is not installed, or can't be imported; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingLibraryError(name.partition(".")[0], purpose, str(error), f"pip install '{extra}'") from error


def first_of(names: Sequence[str], purpose: str, extra: str) -> Any:
    """Return the first of some modules that is installed.

    Parameters
    ----------
    names : sequence of str
        Names of modules, any of which will do.
    purpose, extra : str
        As for `library`.

    Raises
    ------
    MissingLibraryError
        When none is installed; about the first.
    """
    for name in names:
        with suppress(MissingLibraryError):
            return library(name, purpose, extra)
    return library(names[0], purpose, extra)
