"""What the registry knows about quantizers and plugins, one row for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trainable_core.enums import QuantizationMethod, QuantizationTarget
from trainable_core.errors import QuantizerDefinitionError
from trainable_core.hookspecs import Backend
from trainable_core.key import Key
from trainable_core.modifier import Modifier
from trainable_core.reference.method import Method
from trainable_core.registry.marks import keys_of
from trainable_core.registry.methods import check_class, check_declared, check_estimator, declaration_of
from trainable_core.registry.plugins import Plugin


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer class in one backend, and who provides it.

    `distribution` and `version` are None for a plugin that was registered in process.
    """

    backend: str
    target: QuantizationTarget
    methods: tuple[QuantizationMethod, ...]
    training_method: str
    cls: type[Any]
    distribution: str | None
    version: str | None

    @property
    def keys(self) -> list[Key]:
        """Every key the class answers to."""
        return [Key(self.backend, self.target, self.training_method, method) for method in self.methods]

    @property
    def declaration(self) -> Method:
        """What the training method declares."""
        return declaration_of(self.cls, self.training_method)


@dataclass(frozen=True)
class PluginRow:
    """One plugin, under the name that switches it off; `problem` says why it failed, in part or as a whole."""

    name: str
    distribution: str | None
    version: str | None
    state: Literal["loaded", "disabled", "failed"]
    problem: str


@dataclass
class Offer:
    """What one plugin answered for one backend."""

    rows: list[QuantizerRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class ModifierOffer:
    """The modifiers that one plugin has for one backend."""

    classes: list[type[Modifier]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Entry:
    """A plugin, the backends it describes, and what it offers to the backends asked for so far."""

    plugin: Plugin
    disabled: bool = False
    backends: list[Backend] = field(default_factory=list)
    offers: dict[str, Offer] = field(default_factory=dict)
    modifiers: dict[str, ModifierOffer] = field(default_factory=dict)


def quantizer_row(plugin: Plugin, cls: Any, backend: str, base: type[Any] | None = None) -> QuantizerRow:
    """Return the row of a class that a plugin offers.

    Parameters
    ----------
    plugin : Plugin
        The plugin.
    cls : type
        The class.
    backend : str
        The backend that was asked for.
    base : type, optional
        What the backend's quantizers are subclasses of.

    Raises
    ------
    QuantizerDefinitionError, TypeError
        When the class is not what it should be.
    """
    keys = keys_of(cls, backend)
    own = getattr(cls, "backend", backend)
    if own != backend:
        message = f"{cls.__qualname__} is for backend {own!r}, not {backend!r}; return [] for other names than your own"
        raise TypeError(message)
    if base is not None and not issubclass(cls, base):
        raise QuantizerDefinitionError(cls, f"it is not a subclass of {base.__module__}.{base.__name__}")
    check_estimator(cls)
    methods = tuple(dict.fromkeys(key.method for key in keys))
    check_class(cls, keys[0].quantizer_id, keys[0].target)
    declared = getattr(cls, "declaration", None)
    if declared is not None and declared.name == keys[0].quantizer_id:
        check_declared(cls, declared, keys[0].target, methods)
    return QuantizerRow(
        backend, keys[0].target, methods, keys[0].quantizer_id, cls, plugin.distribution, plugin.version
    )


def row_order(row: QuantizerRow) -> tuple[str, ...]:
    """Return what rows are sorted by."""
    return row.backend, row.training_method, row.target.name, row.cls.__module__, row.cls.__qualname__


def provider(plugin: Plugin, row: QuantizerRow) -> str:
    """Return class, distribution and version in a few words."""
    return f"{row.cls.__module__}.{row.cls.__qualname__} ({plugin})"
