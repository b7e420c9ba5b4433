"""Public names that load when used; why is in ``docs/design/0009-public-names-load-when-used.md``."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose names live in its modules.

    Parameters
    ----------
    package : str
        The package's ``__name__``.
    modules : mapping of str to sequence of str
        Public names by the module that defines them.
    """
    home = {name: module for module, names in modules.items() for name in names}
    namespace = vars(sys.modules[package])

    def load(name: str) -> Any:
        """Load a public name from its module, once."""
        if name not in home:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = namespace[name] = getattr(import_module(f"{package}.{home[name]}"), name)
        return value

    def names() -> list[str]:
        """Return the package's names, those not loaded yet included."""
        return sorted({*namespace, *home})

    return load, names
