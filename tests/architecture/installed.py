"""Import every module of the named packages where only their wheels are installed; run by the session `build`.

    python -I tests/architecture/installed.py PACKAGE ... [--without MODULE]

Modules that need an extra are left out, because the clean environment has no extras; so is what ``--without`` names,
because its framework is not there.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

NEEDS_AN_EXTRA = (
    "trainable_core.conformance",
    "trainable_keras.tensorflow_values",
    *(f"trainable_torch.kernels.{name}" for name in ("grid_loops", "layer_loops", "loops")),
)


def check(name: str, left_out: tuple[str, ...]) -> str:
    package = importlib.import_module(name)
    location = Path(package.__file__).parent
    assert location.is_relative_to(sys.prefix), f"{name} was imported from {location}, not from its wheel"
    assert (location / "py.typed").exists(), f"{name} ships no py.typed"
    modules = [
        module
        for module in names(name, location)
        if not module.startswith(left_out) and not module.endswith(".__main__")
    ]
    for module in modules:
        importlib.import_module(module)
    return f"{name}: {len(modules) + 1} modules imported from {location}"


def names(package: str, folder: Path) -> list[str]:
    """Return the names of a package's modules without importing any of them."""
    found = []
    for module in pkgutil.iter_modules([str(folder)], f"{package}."):
        found.append(module.name)
        if module.ispkg:
            found += names(module.name, folder / module.name.rpartition(".")[2])
    return found


if __name__ == "__main__":
    if importlib.util.find_spec("hypothesis"):
        sys.exit("hypothesis is installed: this is not a clean environment")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--without", action="append", default=[])
    options = parser.parse_args()
    for argument in options.packages:
        print(check(argument, (*NEEDS_AN_EXTRA, *options.without)))
