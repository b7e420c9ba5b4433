"""The plugin that ``trainable new-plugin`` writes: a start for an own method that passes the kit as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from trainable_core import __version__
from trainable_core.errors import DocumentError, InvalidArgumentError

TEMPLATES = files("trainable_core.conformance") / "templates"


def backends_with_template() -> list[str]:
    """Return the backends that a plugin can be written for."""
    return sorted(
        entry.name.removesuffix("_quantizers.txt") for entry in TEMPLATES.iterdir() if "_quantizers" in entry.name
    )


def write_plugin(name: str, backends: Sequence[str], folder: Path) -> list[Path]:
    """Write a plugin into a new folder; return its files.

    Parameters
    ----------
    name : str
        Name of the distribution: lower-case letters, digits and hyphens.
    backends : sequence of str
        Some of `backends_with_template`.
    folder : Path
        The folder, which must not exist.

    Raises
    ------
    InvalidArgumentError
        When the name can't be that of a distribution and a package, or a backend has no template.
    DocumentError
        When the folder exists or can't be written.
    """
    package = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) or not package.isidentifier():
        raise InvalidArgumentError(f"plugin name {name!r}", "must be lower-case letters, digits and hyphens")
    for backend in backends:
        if backend not in backends_with_template():
            known = ", ".join(backends_with_template())
            raise InvalidArgumentError(
                f"plugin for {backend!r}", f"there is no template for it; there are templates for: {known}"
            )
    method = package.removeprefix("trainable_").upper()
    major, minor = __version__.split(".")[:2]
    facts = {
        "name": name,
        "package": package,
        "method": method,
        "class_name": "".join(part.title() for part in method.lower().split("_")),
        "low": f"{major}.{minor}",
        "high": f"{major}.{int(minor) + 1}",
    }
    between = f">={facts['low']},<{facts['high']}"
    facts["extras"] = "".join(f'{each} = ["trainable-{each}{between}"]\n' for each in backends)
    facts["branches"] = "".join(_filled("branch.txt", {**facts, "backend": each}) for each in backends)
    sources = {
        "pyproject.toml": "pyproject.txt",
        "README.md": "readme.txt",
        f"src/{package}/__init__.py": "init.txt",
        f"src/{package}/plugin.py": "plugin.txt",
        f"src/{package}/surrogate.py": "surrogate.txt",
        **{f"src/{package}/{backend}_quantizers.py": f"{backend}_quantizers.txt" for backend in backends},
        "tests/test_conformance.py": "test.txt",
    }
    written = []
    try:
        folder.mkdir(parents=True)
        for place, template in sources.items():
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled(template, facts), encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise DocumentError(folder, f"can't be written: {error.strerror}") from error
    return written


def _filled(template: str, facts: Mapping[str, str]) -> str:
    return Template((TEMPLATES / template).read_text("utf-8")).substitute(facts)
