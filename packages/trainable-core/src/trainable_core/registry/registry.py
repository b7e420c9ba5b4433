"""Finds quantizer classes: every plugin is asked for one backend at a time, and none can break another.

``TRAINABLE_DISABLE_PLUGINS=name,name`` switches plugins off, by their own names or their distributions'.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import Enum
from importlib import import_module
from typing import Any, Literal

from trainable_core.enums import QuantizationMethod, QuantizationTarget, TrainingMethod
from trainable_core.errors import (
    DuplicateBackendError,
    DuplicateQuantizerError,
    PluginError,
    UnknownBackendError,
    UnknownQuantizerError,
)
from trainable_core.hookspecs import Backend
from trainable_core.key import Key, identifier_text, is_readable
from trainable_core.modifier import Modifier
from trainable_core.registry.marks import named
from trainable_core.registry.methods import built_in_methods
from trainable_core.registry.plugins import (
    BROKEN,
    DISABLE_VARIABLE,
    IN_PROCESS,
    Plugin,
    PluginHost,
    disabled_names,
    installed_plugins,
    reason,
)
from trainable_core.registry.rows import (
    Entry,
    ModifierOffer,
    Offer,
    PluginRow,
    QuantizerRow,
    provider,
    quantizer_row,
    row_order,
)
from trainable_core.registry.turns import Turns


class Registry:
    """The plugins of one process and the quantizer classes they offer.

    Any method may be called from any thread. Plugins are imported when the registry is first asked something, and each
    one's hook is called once per backend asked for.

    Parameters
    ----------
    path : iterable of str, optional
        Directories searched for installed plugins; None searches ``sys.path``, an empty one finds none.

    Examples
    --------
    >>> Registry(path=[]).list_quantizers()
    []
    """

    def __init__(self, path: Iterable[str] | None = None) -> None:
        self._path = None if path is None else list(path)
        # A plugin that looks something up while it is imported, itself or in a thread, must not wait for itself.
        self._lock = Turns()
        self.reset()

    def reset(self) -> None:
        """Forget every plugin, registered ones too; installed ones are looked for again at the next question."""
        with self._lock:
            self._host = PluginHost()
            self._entries: dict[str, Entry] = {}
            self._loaded = False

    def register(self, plugin: object, name: str) -> None:
        """Add a plugin that is not installed; see `register`."""
        if not isinstance(name, str) or not is_readable(name):
            raise PluginError(str(name), f"its name {name!r} is blank, or holds characters that can't be printed")
        with self._lock:
            self._load()
            self.unregister(name)
            entry = Entry(Plugin(self._in_process_name(name), None, None))
            try:
                self._host.add(entry.plugin, plugin)
            except BROKEN as error:
                raise PluginError(name, str(error)) from error
            self._entries[entry.plugin.name] = entry
            self._ask_for_backends(entry)

    def unregister(self, name: str) -> None:
        """Take back a plugin registered in process under `name`; nothing happens when there is none."""
        with self._lock:
            entry = self._entries.pop(self._in_process_name(name), None)
            if entry is not None:
                self._host.remove(entry.plugin)

    def get_trainable_quantizer_class(
        self,
        quant_target: QuantizationTarget | Enum | str,
        quantizer_id: TrainingMethod | Enum | str,
        quant_method: QuantizationMethod | Enum | str,
        backend: str = "torch",
    ) -> type[Any]:
        """Return the one class registered for these; see `get_trainable_quantizer_class`."""
        target = named(QuantizationTarget, "quant_target", quant_target)
        method = named(QuantizationMethod, "quant_method", quant_method)
        key = Key(backend, target, identifier_text(quantizer_id), method)
        with self._lock:
            self.get_backend(backend)
            offered = self._offered(backend)
            found = [(plugin, row) for plugin, row in offered if key in row.keys]
            classes = {row.cls for _, row in found}
            if not classes:
                known = {known for _, row in offered for known in row.keys}
                raise UnknownQuantizerError(
                    key,
                    known,
                    self._missing(backend),
                    known_backends=list(self._claims()),
                    built_in=built_in_methods(),
                    elsewhere=self._elsewhere(backend, key.quantizer_id),
                )
            if len(classes) > 1:
                raise DuplicateQuantizerError(key, [provider(plugin, row) for plugin, row in found])
        return classes.pop()

    def list_quantizers(self, backend: str | None = None) -> list[QuantizerRow]:
        """Return a row per quantizer class; see `list_quantizers`."""
        with self._lock:
            self._load()
            known = sorted(self._claims())
            if backend is not None and backend not in known:
                raise UnknownBackendError(str(backend), known, self._missing(backend))
            asked = known if backend is None else [backend]
            rows = [row for name in asked for _, row in self._offered(name)]
        return sorted(rows, key=row_order)

    def list_modifiers(self, backend: str) -> dict[str, list[tuple[Plugin, type[Modifier]]]]:
        """Return a backend's modifiers by name, each with its plugin; more than one under a name is a clash."""
        with self._lock:
            self.get_backend(backend)
            found: dict[str, list[tuple[Plugin, type[Modifier]]]] = {}
            for entry in list(self._entries.values()):  # as in `_offered`
                if backend not in entry.modifiers:
                    entry.modifiers[backend] = self._ask_for_modifiers(entry.plugin, backend)
                for cls in entry.modifiers[backend].classes:
                    found.setdefault(cls.name, []).append((entry.plugin, cls))
        return found

    def list_backends(self) -> list[Backend]:
        """Return what the installed backends say about themselves; see `list_backends`."""
        with self._lock:
            self._load()
            described = [backend for entry in self._entries.values() for backend in entry.backends]
        return sorted(described, key=lambda backend: (backend.name, backend.distribution))

    def get_backend(self, name: str) -> Backend:
        """Return what the backend `name` says about itself; see `get_backend`."""
        with self._lock:
            self._load()
            claims = self._claims()
            if not isinstance(name, str) or name not in claims:
                raise UnknownBackendError(str(name), claims, self._missing(name))
            if len(claims[name]) > 1:
                raise DuplicateBackendError(name, [str(plugin) for plugin, _ in claims[name]])
        return claims[name][0][1]

    def plugins(self) -> list[PluginRow]:
        """Return a row per plugin, installed or registered in process, in the order they were found."""
        with self._lock:
            self._load()
            return [self._plugin_row(entry) for entry in self._entries.values()]

    def failures(self) -> dict[str, str]:
        """Return what went wrong so far, by plugin; see `failures`."""
        return {row.name: row.problem for row in self.plugins() if row.problem}

    def clashes(self) -> dict[Key, list[str]]:
        """Return the keys that two different classes answer to in any installed backend, with their providers."""
        with self._lock:
            self._load()
            answers: dict[Key, list[tuple[Plugin, QuantizerRow]]] = {}
            for backend in sorted(self._claims()):
                for plugin, row in self._offered(backend):
                    for key in row.keys:
                        answers.setdefault(key, []).append((plugin, row))
        return {
            key: [provider(plugin, row) for plugin, row in found]
            for key, found in answers.items()
            if len({row.cls for _, row in found}) > 1
        }

    def unknown_disabled(self) -> list[str]:
        """Return the names in ``TRAINABLE_DISABLE_PLUGINS`` that no installed plugin or distribution has."""
        with self._lock:
            self._load()
            off = [entry.plugin for entry in self._entries.values() if entry.disabled]
        return sorted(name for name in disabled_names() if not any(plugin.is_among([name]) for plugin in off))

    def _load(self) -> None:
        """Import every installed plugin that is not switched off, and let it describe its backend."""
        if self._loaded:
            return
        self._loaded = True  # first: a plugin that asks the registry while it is imported sees the plugins before it
        try:
            off = disabled_names()
            for plugin in installed_plugins(self._path):
                entry = self._entries.setdefault(plugin.name, Entry(plugin))
                if entry.plugin is not plugin:
                    entry.plugin.problems.append(f"{plugin.distribution} has two entry points of this name")
                elif plugin.is_among(off):
                    entry.disabled = True
                elif self._host.load(plugin):
                    self._ask_for_backends(entry)
        except BaseException:
            self.reset()  # interrupted by the user: the next question starts afresh
            raise

    def _ask_for_backends(self, entry: Entry) -> None:
        results, problems = self._host.call(entry.plugin, "trainable_register_backend")
        for result in results:
            if isinstance(result, Backend):
                entry.backends.append(result)
            elif result is not None:
                problems.append(
                    f"trainable_register_backend() returned a {type(result).__name__}, not a Backend or None"
                )
        entry.plugin.problems += problems

    def _offered(self, backend: str) -> list[tuple[Plugin, QuantizerRow]]:
        """Return every plugin's classes for a backend; a hook is called the first time."""
        offered = []
        for entry in list(self._entries.values()):  # a list: a hook may register a plugin
            if backend not in entry.offers:
                entry.offers[backend] = Offer()  # a hook that looks something up meets this, not itself again
                try:
                    entry.offers[backend] = self._ask_for_quantizers(entry.plugin, backend)
                except BaseException:
                    del entry.offers[backend]  # interrupted by the user: ask again the next time
                    raise
            offered += [(entry.plugin, row) for row in entry.offers[backend].rows]
        return offered

    def _ask_for_quantizers(self, plugin: Plugin, backend: str) -> Offer:
        results, problems = self._host.call(plugin, "trainable_register_quantizers", backend)
        offer = Offer(problems=problems)
        for result in results:
            if not isinstance(result, list):
                call = f"trainable_register_quantizers({backend!r})"
                offer.problems.append(f"{call} returned a {type(result).__name__}, not a list; return [] for none")
                continue
            for cls in result:
                try:
                    offer.rows.append(quantizer_row(plugin, cls, backend, self._quantizer_base(backend)))
                except BROKEN as error:
                    offer.problems.append(reason(error))
        return offer

    def _ask_for_modifiers(self, plugin: Plugin, backend: str) -> ModifierOffer:
        results, problems = self._host.call(plugin, "trainable_register_modifiers", backend)
        offer = ModifierOffer(problems=problems)
        for cls in (each for result in results for each in (result if isinstance(result, list) else [result])):
            if isinstance(cls, type) and issubclass(cls, Modifier) and isinstance(getattr(cls, "name", None), str):
                offer.classes.append(cls)
            else:
                call = f"trainable_register_modifiers({backend!r})"
                offer.problems.append(f"{call} offers {cls!r}, which is no subclass of Modifier with a name")
        return offer

    def _quantizer_base(self, backend: str) -> type[Any] | None:
        """Return the base class of a backend's quantizers, where it names one that can be imported."""
        claims = self._claims().get(backend)
        module, _, name = (claims[0][1].quantizer_base if claims else "").partition(":")
        try:
            return getattr(import_module(module), name) if module else None
        except BROKEN:
            return None  # its framework is missing or broken, which its own hook tells

    def _elsewhere(self, backend: str, quantizer_id: str) -> list[str]:
        """Return the other backends that have a training method, of those whose framework is in the process already."""
        claims = self._claims()
        others = [
            name
            for name in sorted(set(claims) - {backend})
            if any(name in entry.offers for entry in self._entries.values())
            or all(part.replace("-", "_") in sys.modules for part in claims[name][0][1].framework)
        ]
        return [name for name in others if any(row.training_method == quantizer_id for _, row in self._offered(name))]

    def _claims(self) -> dict[str, list[tuple[Plugin, Backend]]]:
        """Return who says to be which backend; more than one per name is a clash."""
        claims: dict[str, list[tuple[Plugin, Backend]]] = {}
        for entry in self._entries.values():
            for backend in entry.backends:
                claims.setdefault(backend.name, []).append((entry.plugin, backend))
        return claims

    def _problems(self, entry: Entry, backend: str | None = None) -> list[str]:
        """Return what went wrong with a plugin; given a backend, only what may explain that it lacks something."""
        problems = list(entry.plugin.problems)
        for offers in (entry.offers, entry.modifiers):
            problems += [text for name, each in offers.items() if backend in (None, name) for text in each.problems]
        claims = self._claims()
        for own in entry.backends:
            others = [str(plugin) for plugin, _ in claims[own.name] if plugin is not entry.plugin]
            if others and backend in (None, own.name):
                problems.append(f"backend {own.name!r} is also provided by {'; '.join(others)}")
        return problems

    def _missing(self, backend: str) -> dict[str, str]:
        """Return, by plugin, what may explain that a backend lacks something."""
        problems = {
            name: [f"switched off by {DISABLE_VARIABLE}"] if entry.disabled else self._problems(entry, backend)
            for name, entry in self._entries.items()
        }
        return {name: "; ".join(texts) for name, texts in problems.items() if texts}

    def _plugin_row(self, entry: Entry) -> PluginRow:
        problem = "; ".join(self._problems(entry))
        state: Literal["loaded", "disabled", "failed"] = "failed" if problem else "loaded"
        plugin = entry.plugin
        return PluginRow(
            plugin.name, plugin.distribution, plugin.version, "disabled" if entry.disabled else state, problem
        )

    def _in_process_name(self, name: str) -> str:
        """Return the name that a plugin registered in process gets: an installed one of that name keeps it."""
        holder = self._entries.get(name)
        return name if holder is None or holder.plugin.distribution is None else f"{name} ({IN_PROCESS})"
