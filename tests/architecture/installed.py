"""Import every module of the named packages where only their wheels are installed; run by the session `build`.

A module that only an extra makes importable is left out: the clean environment has no extras.
"""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

NEEDS_AN_EXTRA = ("trainable_core.conformance", "trainable_torch.kernels.grid_loops", "trainable_torch.kernels.loops")


def check(name: str) -> str:
    package = importlib.import_module(name)
    location = Path(package.__file__).parent
    assert location.is_relative_to(sys.prefix), f"{name} was imported from {location}, not from its wheel"
    assert (location / "py.typed").exists(), f"{name} ships no py.typed"
    modules = [
        module.name
        for module in pkgutil.walk_packages(package.__path__, f"{name}.", onerror=None)
        if not module.name.startswith(NEEDS_AN_EXTRA) and not module.name.endswith(".__main__")
    ]
    for module in modules:
        importlib.import_module(module)
    return f"{name}: {len(modules) + 1} modules imported from {location}"


if __name__ == "__main__":
    if importlib.util.find_spec("hypothesis"):
        sys.exit("hypothesis is installed: this is no clean environment")
    for argument in sys.argv[1:]:
        print(check(argument))
