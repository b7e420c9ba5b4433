"""The registry of this process: it looks for installed plugins when it is first asked something."""

from __future__ import annotations

from enum import Enum
from typing import Any

from trainable_core.enums import QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.errors import UnsupportedConfigError
from trainable_core.hookspecs import Backend
from trainable_core.modifier import Modifier, unknown_modifier
from trainable_core.registry.registry import Registry
from trainable_core.registry.rows import QuantizerRow

_DEFAULT = Registry()  # knows nothing until it is asked something


def default_registry() -> Registry:
    """Return the process's own registry, which the functions of this module ask."""
    return _DEFAULT


def register(plugin: object, name: str) -> None:
    """Add a plugin that is not installed, for notebooks and tests; asked like any other from then on.

    Registering a name again replaces what was registered under it. Where an installed plugin has the name, it becomes
    ``"name (in process)"``. ``TRAINABLE_DISABLE_PLUGINS`` does not concern it.

    Parameters
    ----------
    plugin : object
        A module, or an object with methods, marked with ``@hookimpl``.
    name : str
        What errors and `failures` call it.

    Raises
    ------
    PluginError
        When the object has no hook, one of an unknown name, or one with wrong arguments.
    """
    _DEFAULT.register(plugin, name)


def unregister(name: str) -> None:
    """Take back a plugin that `register` added under `name`; nothing happens when there is none.

    An installed plugin stays; `TRAINABLE_DISABLE_PLUGINS` switches it off.
    """
    _DEFAULT.unregister(name)


def get_trainable_quantizer_class(
    quant_target: QuantizationTarget | Enum | str,
    quantizer_id: TrainingMethod | Enum | str,
    quant_method: QuantizationMethod | Enum | str,
    backend: str = "torch",
) -> type[Any]:
    """Return the one class registered for a target, a training method and a quantization method in a backend.

    Parameters
    ----------
    quant_target : QuantizationTarget or str
        Core's member, mctq's, or its name.
    quantizer_id : TrainingMethod or str
        How it learns; a plugin's method is any string.
    quant_method : QuantizationMethod or str
        Core's member, mctq's, or its name.
    backend : str
        Name of an installed backend, such as ``"torch"``.

    Returns
    -------
    type
        The quantizer class; call it with a config.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides the backend.
    DuplicateBackendError
        When two do.
    UnknownQuantizerError
        When no class answers; the message lists what is registered and which plugins failed.
    DuplicateQuantizerError
        When two different classes do; the message names both providers.
    InvalidArgumentError
        When `quant_target` or `quant_method` names nothing.
    """
    return _DEFAULT.get_trainable_quantizer_class(quant_target, quantizer_id, quant_method, backend)


def list_quantizers(backend: str | None = None) -> list[QuantizerRow]:
    """Return a row per quantizer class, sorted by backend, training method, target and class.

    Parameters
    ----------
    backend : str, optional
        One backend; None asks every installed one, and `failures` lists those whose framework could not be imported.

    Returns
    -------
    list of QuantizerRow
        Classes that clash are all listed; only a lookup refuses them.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides `backend`.
    """
    return _DEFAULT.list_quantizers(backend)


def list_backends() -> list[Backend]:
    """Return what the installed backends say about themselves, sorted by name; imports no framework."""
    return _DEFAULT.list_backends()


def get_backend(name: str) -> Backend:
    """Return what the backend `name` says about itself; imports no framework.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides it.
    DuplicateBackendError
        When two do.
    """
    return _DEFAULT.get_backend(name)


def failures() -> dict[str, str]:
    """Return what went wrong so far, by plugin: imports, hooks, classes not well marked, backends that clash.

    A hook that no one asked for yet has not failed yet; ``list_quantizers()`` asks them all.
    """
    return _DEFAULT.failures()


def get_modifier_class(name: str, backend: str, subject: str) -> type[Modifier]:
    """Return the one class registered for a modifier's name in a backend.

    Parameters
    ----------
    name : str
        What a recipe calls it.
    backend : str
        Name of an installed backend.
    subject : str
        What asks for it, for errors.

    Raises
    ------
    UnknownBackendError
        When no installed plugin provides the backend.
    UnsupportedConfigError
        When no class has the name, or several plugins have one.
    """
    known = _DEFAULT.list_modifiers(backend)
    found = known.get(name, [])
    if len({cls for _, cls in found}) == 1:
        return found[0][1]
    problem = unknown_modifier(name, known)
    if found:
        problem = f"{len(found)} plugins have a modifier {name!r}: {'; '.join(str(plugin) for plugin, _ in found)}"
    raise UnsupportedConfigError(f"{subject}: modifiers", problem)
