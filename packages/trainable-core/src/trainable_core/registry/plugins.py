"""Installed plugins: found, imported and called one by one, so that one that fails does not affect the others."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, Final

import pluggy

from trainable_core import hookspecs
from trainable_core.hookspecs import PROJECT

DISABLE_VARIABLE: Final = "TRAINABLE_DISABLE_PLUGINS"
"""Environment variable with the names of plugins, or of their distributions, to leave out; separated by commas."""

IN_PROCESS: Final = "in process"
"""Stands where a distribution's name would, for a plugin that is not installed."""

HOOKS: Final = ("trainable_register_quantizers", "trainable_register_modifiers", "trainable_register_backend")

BROKEN: Final = (Exception, SystemExit)
"""Errors of a plugin's import or hook that are recorded instead of raised; an interrupt by the user is raised."""


@dataclass
class Plugin:
    """One plugin and what went wrong with it; `name` is unique among plugins and switches it off."""

    name: str
    distribution: str | None
    version: str | None
    entry_point: EntryPoint | None = None
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        origin = IN_PROCESS if self.distribution is None else f"{self.distribution} {self.version}"
        return f"{origin}, plugin {self.name!r}"

    @property
    def names(self) -> set[str]:
        """Names that switch the plugin off: its own, and the one it shares with another distribution's plugin."""
        return {self.name, self.name.removesuffix(f" ({self.distribution})")}

    def is_among(self, names: Collection[str]) -> bool:
        """Return whether one of the names is the plugin's own or, spelled in any way, its distribution's."""
        own = self.distribution is not None and normalized(self.distribution) in map(normalized, names)
        return own or not self.names.isdisjoint(names)


def normalized(distribution: str) -> str:
    """Return a distribution's name as installers compare it: lower-case, with hyphens."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def reason(error: BaseException) -> str:
    """Return an error's class and message, without keeping its traceback alive."""
    return f"{type(error).__name__}: {error}"


def disabled_names() -> set[str]:
    """Return the names that ``TRAINABLE_DISABLE_PLUGINS`` lists."""
    return {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}


def installed_plugins(path: list[str] | None = None) -> Iterator[Plugin]:
    """Yield every installed plugin, nothing imported yet; one whose entry points can't be read carries a problem.

    Parameters
    ----------
    path : list of str, optional
        Directories to search; None searches ``sys.path``.
    """
    found: list[Plugin] = []
    for distribution in _distributions(path):
        name, version = _identity(distribution)
        try:
            entry_points = [entry for entry in distribution.entry_points if entry.group == PROJECT]
        except BROKEN as error:
            problem = f"its entry_points.txt can't be read: {reason(error)}"
            found.append(Plugin(name, name, version, problems=[problem]))
        else:
            found += [Plugin(entry.name, name, version, entry) for entry in entry_points]
    shared = Counter(plugin.name for plugin in found)
    for plugin in found:
        if shared[plugin.name] > 1:
            plugin.name = f"{plugin.name} ({plugin.distribution})"
        yield plugin


def _distributions(path: list[str] | None) -> Iterator[Distribution]:
    """Yield the distributions with entry points of our group; the first of a name on the path hides the others.

    `importlib.metadata.entry_points` would parse every file there is, so that one malformed file hides all plugins.
    """
    where: dict[str, Any] = {} if path is None else {"path": path}
    seen: set[str] = set()
    for candidate in distributions(**where):
        try:
            if f"[{PROJECT}]" not in (candidate.read_text("entry_points.txt") or ""):
                continue
            name, _ = _identity(candidate)
            first = next(iter(distributions(name=name, **where)), candidate)
        except BROKEN:
            continue  # unreadable: nothing says that it is a plugin
        if name not in seen:
            seen.add(name)
            yield first


def _identity(distribution: Distribution) -> tuple[str, str]:
    """Return a distribution's name and version, ``"?"`` for what its metadata lacks."""
    metadata = distribution.metadata
    name, version = (metadata[key] if key in metadata else "?" for key in ("Name", "Version"))  # noqa: SIM401 - no get
    return name, version


class PluginHost:
    """The plugins that were imported, and their hooks, called one plugin at a time."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)

    def load(self, plugin: Plugin) -> bool:
        """Import an installed plugin and add it; return whether that went well, and note in the plugin what did not."""
        if plugin.entry_point is None:
            return False
        try:
            loaded = plugin.entry_point.load()
        except BROKEN as error:
            plugin.problems.append(f"importing {plugin.entry_point.value} raised {reason(error)}")
            return False
        try:
            self.add(plugin, loaded)
        except BROKEN as error:
            plugin.problems.append(reason(error))
            return False
        return True

    def add(self, plugin: Plugin, loaded: object) -> None:
        """Add a plugin's module or object under its name; pluggy checks the arguments of its hooks.

        Raises
        ------
        TypeError
            When it has no hook, or one of an unknown name.
        pluggy.PluginValidationError
            When a hook of it takes an argument that the specification does not have.
        """
        try:
            self._manager.register(loaded, name=plugin.name)
            self._check_hooks(plugin, self._manager.get_hookcallers(loaded) or [])
        except BaseException:
            self.remove(plugin)
            raise

    @staticmethod
    def _check_hooks(plugin: Plugin, callers: list[pluggy.HookCaller]) -> None:
        """Refuse a plugin that would never be called: without a hook, or with a name pluggy only stores."""
        if not callers:
            message = f"it implements none of {', '.join(HOOKS)}"
            raise TypeError(message)
        for caller in callers:
            optional = all(i.optionalhook for i in caller.get_hookimpls() if i.plugin_name == plugin.name)
            if not caller.has_spec() and not optional:
                message = f"unknown hook {caller.name!r}; hooks: {', '.join(HOOKS)}"
                raise TypeError(message)

    def remove(self, plugin: Plugin) -> None:
        """Take a plugin out again."""
        self._manager.unregister(name=plugin.name)

    def call(self, plugin: Plugin, hook: str, *arguments: str) -> tuple[list[object], list[str]]:
        """Return what one plugin's implementations of `hook` returned, and what those that raised said."""
        results: list[object] = []
        problems: list[str] = []
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            if implementation.plugin_name == plugin.name:
                try:  # an implementation may leave arguments out but not rename them: pluggy has checked
                    results.append(implementation.function(*arguments[: len(implementation.argnames)]))
                except BROKEN as error:
                    problems.append(f"{hook}({', '.join(map(repr, arguments))}) raised {reason(error)}")
        return results, problems
