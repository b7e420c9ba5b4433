"""The command line, ``trainable``: what is installed, what is broken, and the schemas of the documents."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from trainable_core import __version__
from trainable_core.conformance import commands
from trainable_core.errors import INSTALL, DocumentError, TrainableError
from trainable_core.export import commands as verifying
from trainable_core.hookspecs import Backend
from trainable_core.registry.process import default_registry
from trainable_core.registry.registry import Registry
from trainable_core.registry.rows import QuantizerRow
from trainable_core.reporting import commands as reporting

OK, FAILED, ERROR = 0, 1, 2
"""Exit codes: all well; ``doctor`` found something broken; the command could not be carried out."""

UNKNOWN_VERSION = "version unknown"

UNFOLDED = 100_000
"""Columns of an output that is no terminal: more than any table needs, so that no cell is folded."""

FOLDED = 120
"""Columns of what ``doctor`` prints there: people send it to each other."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One sub-command: how it is called, what it does."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; None takes those of the process.

    Returns
    -------
    int
        0 when all is well, 1 when ``doctor`` found something broken, 2 when the command could not be carried out.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except TrainableError as error:
        sys.stderr.write(f"{error}\n")
        return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trainable", description="Trainable quantizers: what is installed here.")
    parser.add_argument("--version", action="version", version=f"trainable-core {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", metavar="NAME", help="only this backend's; by default every installed one is asked"
    )
    _json_argument(parser)


def _list(arguments: argparse.Namespace) -> int:
    registry = default_registry()
    with _quiet_stdout():
        rows = registry.list_quantizers(arguments.backend)
    failures = registry.failures()
    if arguments.json:
        _print_json({"quantizers": [_row_document(row) for row in rows], "failures": failures})
        return OK
    if rows:
        columns = ("backend", "training method", "target", "quantization methods", "class", "provided by")
        _print_table("quantizers", columns, [_row_cells(row) for row in rows])
    else:
        sys.stdout.write("no quantizers are registered\nHint: install a backend: " + ", ".join(INSTALL.values()) + "\n")
    for name, problem in failures.items():
        sys.stderr.write(f"plugin {name!r} failed: {problem}\n")
    return OK


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", type=Path, help="write here instead of to standard output")


def _schema(arguments: argparse.Namespace) -> int:
    from trainable_core import config  # noqa: PLC0415 - no other command needs the configs
    from trainable_core.recipe.document import QuantizationRecipe  # noqa: PLC0415 - nor the recipe

    documents = (
        config.TrainableQuantizerWeightsConfig,
        config.TrainableQuantizerActivationConfig,
        config.TrainableQuantizerCandidateConfig,
        QuantizationRecipe,
    )
    schemas = {document.__name__: document.model_json_schema() for document in documents}
    if arguments.output is None:
        _print_json(schemas)
        return OK
    try:
        arguments.output.write_text(json.dumps(schemas, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DocumentError(arguments.output, f"can't be written: {error.strerror}") from error
    return OK


def _doctor(arguments: argparse.Namespace) -> int:
    with _quiet_stdout():
        report = _diagnose(default_registry())
    if arguments.json:
        _print_json(report)
    else:
        _print_report(report)
    return OK if report["ok"] else FAILED


def _diagnose(registry: Registry) -> dict[str, Any]:
    """Ask every backend for its quantizers and return all there is to report, as a JSON document."""
    rows = registry.list_quantizers()
    clashes = [{"key": str(key), "providers": providers} for key, providers in registry.clashes().items()]
    backends: list[dict[str, Any]] = [
        {
            "name": backend.name,
            "distribution": backend.distribution,
            "version": _version(backend.distribution),
            "framework": {name: _version(name) for name in backend.framework},
            "tie_rule": backend.tie_rule.value,
            "verbs": backend.verbs,
            "quantizers": sum(row.backend == backend.name for row in rows),
            "remarks": _remarks(backend),
        }
        for backend in registry.list_backends()
    ]
    missing = sorted({name for backend in backends for name, found in backend["framework"].items() if found is None})
    return {
        "ok": not (clashes or missing or registry.failures()),
        "versions": {
            "python": platform.python_version(),
            "trainable-core": __version__,
            **{name: _version(name) for name in ("numpy", "pydantic", "pluggy")},
        },
        "backends": backends,
        "missing": missing,
        "plugins": [dataclasses.asdict(plugin) for plugin in registry.plugins()],
        "unknown_disabled": registry.unknown_disabled(),
        "clashes": clashes,
    }


def _remarks(backend: Backend) -> list[str]:
    """Return what a backend remarks about this installation; why it can't, if asking it fails."""
    if not backend.remarks:
        return []
    module, _, function = backend.remarks.partition(":")
    try:
        return [str(remark) for remark in getattr(import_module(module), function)()]
    except Exception as error:  # noqa: BLE001 - its framework may be missing or broken, which the rest of the report tells
        return [f"{backend.remarks} failed: {type(error).__name__}: {error}"]


def _print_report(report: dict[str, Any]) -> None:
    versions = [(name, version or "missing") for name, version in report["versions"].items()]
    _print_table("versions", ("name", "version"), versions, FOLDED)
    backends = [
        (
            backend["name"],
            f"{backend['distribution']} {backend['version'] or ''}",
            ", ".join(f"{name} {version or 'missing'}" for name, version in backend["framework"].items()),
            backend["tie_rule"],
            str(backend["quantizers"]),
        )
        for backend in report["backends"]
    ]
    _print_table("backends", ("name", "distribution", "framework", "ties", "quantizers"), backends, FOLDED)
    plugins = [
        (
            plugin["name"],
            f"{plugin['distribution'] or 'in process'} {plugin['version'] or ''}",
            plugin["state"],
            plugin["problem"],
        )
        for plugin in report["plugins"]
    ]
    _print_table("plugins", ("name", "distribution", "state", "problem"), plugins, FOLDED)
    if report["clashes"]:
        clashes = [(clash["key"], "; ".join(clash["providers"])) for clash in report["clashes"]]
        _print_table("clashes", ("quantizer", "provided by"), clashes, FOLDED)
    notes = [f"{backend['name']}: {remark}" for backend in report["backends"] for remark in backend["remarks"]]
    unknown = "which no installed plugin or distribution is called"
    notes += [f"TRAINABLE_DISABLE_PLUGINS names {name!r}, {unknown}" for name in report["unknown_disabled"]]
    for note in notes:
        sys.stdout.write(textwrap.fill(note, FOLDED, subsequent_indent="  ", break_on_hyphens=False) + "\n")
    sys.stdout.write(
        "all is well\n" if report["ok"] else "something is broken: see missing, failed and clashes above\n"
    )


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of tables")


COMMANDS = (
    Command("list", "List the quantizers that installed plugins offer.", _list_arguments, _list),
    Command("schema", "Print the JSON schemas of configs and recipe.", _schema_arguments, _schema),
    Command("doctor", "Check the installation; exit with 1 when something is broken.", _json_argument, _doctor),
    Command(
        "check",
        "Check quantizers against the laws of the conformance kit; exit with 1 when one is broken.",
        commands.check_arguments,
        lambda arguments: commands.check(arguments, _print_table),
    ),
    Command(
        "methods",
        "List the built-in training methods and what each declares.",
        commands.methods_arguments,
        lambda arguments: commands.methods(arguments, _print_table),
    ),
    Command(
        "matrix",
        "Show which installed backend implements which training method on which grid.",
        commands.matrix_arguments,
        lambda arguments: commands.matrix(arguments, _print_table),
    ),
    Command(
        "verify",
        "Run an exported file in ONNX Runtime and compare every code with NumPy's; exit with 1 when one differs.",
        verifying.arguments,
        lambda arguments: verifying.verify(arguments, _print_table),
    ),
    Command(
        "describe",
        "Show what is quantized in a saved or exported file, without the model's code.",
        reporting.describe_arguments,
        lambda arguments: reporting.describe(arguments, _print_table),
    ),
    Command(
        "report",
        "Write an HTML page about a saved or exported file.",
        reporting.report_arguments,
        reporting.report,
    ),
    Command(
        "new-plugin",
        "Write a plugin from a template that passes the conformance kit.",
        commands.new_plugin_arguments,
        commands.new_plugin,
    ),
)


def _row_document(row: QuantizerRow) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "training_method": row.training_method,
        "target": row.target.name,
        "quantization_methods": [method.name for method in row.methods],
        "class": f"{row.cls.__module__}.{row.cls.__qualname__}",
        "distribution": row.distribution,
        "version": row.version,
    }


def _row_cells(row: QuantizerRow) -> tuple[str, ...]:
    methods = ", ".join(method.name for method in row.methods)
    provider = "in process" if row.distribution is None else f"{row.distribution} {row.version}"
    name = f"{row.cls.__module__}.{row.cls.__qualname__}"
    return row.backend, row.training_method, row.target.name, methods, name, provider


def _version(distribution: str) -> str | None:
    """Return the version of a distribution, None when it is not there; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        # On the path without metadata (a source tree), or installed under another name (tensorflow-cpu).
        name = distribution.replace("-", "_")
        return UNKNOWN_VERSION if name.isidentifier() and util.find_spec(name) else None


def _quiet_stdout() -> contextlib.redirect_stdout[Any]:
    """Send what plugins and frameworks print while they are imported to stderr: stdout is for the answer."""
    return contextlib.redirect_stdout(sys.stderr)


def _print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], unwatched: int = UNFOLDED) -> None:
    """Print a table, drawn by rich where it is installed; not wider than `unwatched` where that is no terminal."""
    if not rows:
        sys.stdout.write(f"{title}: none\n")
        return
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    try:
        from rich.console import Console  # noqa: PLC0415 - an extra
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        sys.stdout.write(_plain_table(title, columns, cells, unwatched))
        return
    table = Table(*columns, title=title, title_justify="left")
    for row in cells:
        table.add_row(*map(Text, row))  # Text: brackets in an error message are not markup
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = unwatched
    console.print(table)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> str:
    lines = [list(columns), *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    while sum(widths) + 2 * len(widths) > limit:  # the widest column is folded
        widths[widths.index(max(widths))] -= 1
    folded: list[str] = []
    for line in lines:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(line, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True))
            folded.append(f"  {padded}".rstrip())
    return "\n".join([title, *folded]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
