"""Which Keras a model belongs to; the only module that imports `keras2` and `keras3`, and only the one that is needed.

Two generations of Keras may be installed, and imported, side by side: Keras 3 as ``keras``, and Keras 2 as ``tf_keras``
or, with TensorFlow 2.15, as ``keras``. A verb asks the object that it is given. For a class, such as
`BaseKerasTrainableQuantizer`, there is no object to ask: the generation that the process has imported decides.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainable_core.errors import FrameworkError, InvalidArgumentError, ModelError

if TYPE_CHECKING:
    from trainable_keras.framework import Framework

NAMES = ("keras", "tf_keras")
"""What Keras is imported as."""

_looked_up: set[int] = set()
"""Generations that the registry imported to list their quantizers, and that nothing else had imported before."""


def generation_of(cls: type) -> int | None:
    """Return the generation of Keras that a class is a layer of: 2, 3, or None when it is not a layer."""
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if base.__name__ == "Layer" and root in NAMES:
            return _generation(str(getattr(sys.modules.get(root), "__version__", "")))
    return None


def framework_of(model: Any, what: str) -> Framework:
    """Return the Keras that a model belongs to.

    Parameters
    ----------
    model : object
        A model or layer.
    what : str
        What it is called in errors.

    Raises
    ------
    ModelError
        When it is not Keras's, or is of a Keras 2 that TensorFlow doesn't use.
    FrameworkError
        When it is Keras 2's, and TensorFlow uses Keras 3.
    """
    generation = generation_of(type(model))
    if generation is None:
        raise ModelError(
            f"{what} must be a Keras model, got {type(model).__module__}.{type(model).__qualname__}",
            "build it with keras (Keras 3), or with tf.keras where that is Keras 2.",
        )
    framework = _framework(generation)
    framework.check(model, what)
    return framework


def framework_of_class(cls: Any) -> Framework:
    """Return the Keras that a layer class belongs to.

    Raises
    ------
    InvalidArgumentError
        When it is not a layer class of Keras.
    FrameworkError
        When it is Keras 2's, and TensorFlow uses Keras 3.
    """
    generation = generation_of(cls) if isinstance(cls, type) else None
    if generation is None:
        raise InvalidArgumentError("register_layer", f"{cls!r} is not a subclass of keras.layers.Layer")
    return _framework(generation)


def part_in_charge(name: str) -> ModuleType:
    """Return `keras3` or `keras2`, whichever this process uses; for names that are looked up without a model.

    That is the generation that is imported. Where none is, or only by the registry for a look-up, it is the one that
    TensorFlow would take: Keras 2 with ``TF_USE_LEGACY_KERAS=1``, else the one that is installed as ``keras``.

    Parameters
    ----------
    name : str
        The name that is looked up, for the error.

    Raises
    ------
    FrameworkError
        When both generations are imported, or none is installed.
    """
    found = imported_generations() - _looked_up
    if len(found) > 1:
        raise FrameworkError(
            "keras",
            f"Keras 2 and Keras 3 are both imported, so it is not clear which {name} is meant",
            f"use trainable_keras.keras3.{name} or trainable_keras.keras2.{name}.",
        )
    return _part(found.pop() if found else _installed_generation())


def imported_generations() -> set[int]:
    """Return the generations of Keras that this process has imported, or that an imported TensorFlow will take."""
    found = {_generation(str(getattr(sys.modules.get(name), "__version__", ""))) for name in NAMES}
    if _legacy() and "tensorflow" in sys.modules:
        found.add(2)
    return {generation for generation in found if generation is not None}


def is_installed(generation: int) -> bool:
    """Return whether a generation of Keras is installed, by the metadata of distributions: nothing is imported."""
    for distribution in ("keras", "tf-keras"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            if _generation(metadata.version(distribution)) == generation:
                return True
    return generation in imported_generations()


@contextlib.contextmanager
def looking_up() -> Iterator[None]:
    """Import a generation only to list its quantizers: whoever lists them all has not chosen it by that."""
    before = imported_generations()
    try:
        yield
    finally:
        _looked_up.update(imported_generations() - before)


def register_imported() -> None:
    """Register our layers with each Keras that is imported already, so that its ``load_model`` finds them."""
    for generation in imported_generations():
        with contextlib.suppress(FrameworkError):  # it is raised again, with the reason, when the backend is used
            _framework(generation)


def _framework(generation: int) -> Framework:
    part = _part(generation).__name__
    import_module(f"{part}.engine")  # first, because it says which version is missing
    framework: Framework = import_module(f"{part}.framework").FRAMEWORK
    return framework


def _part(generation: int) -> ModuleType:
    return import_module(f"trainable_keras.keras{generation}")


def _generation(version: str) -> int | None:
    major = version.partition(".")[0]
    return int(major) if major in {"2", "3"} else None


def _legacy() -> bool:
    return os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in {"1", "true"}


def _installed_generation() -> int:
    preferred = (2, 3) if _legacy() else (3, 2)
    for generation in preferred:
        if is_installed(generation):
            return generation
    raise FrameworkError(
        "keras",
        "no Keras is installed",
        'pip install "trainable-keras[tensorflow]" for Keras 3, or "trainable-keras[legacy]" for Keras 2.',
    )
