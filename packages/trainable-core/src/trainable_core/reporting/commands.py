"""The commands ``trainable describe`` and ``trainable report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainable_core.reporting.files import FileContents

DONE = 0
"""Exit code: what was asked for was printed or written."""

FILE = "what `save` or `export` wrote, or the JSON of a description"


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``describe``."""
    parser.add_argument("file", type=Path, help=FILE)
    parser.add_argument("--json", action="store_true", help="print a JSON document instead of tables")


def describe(
    given: argparse.Namespace, print_table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]
) -> int:
    """Print what a file says of itself; returns the exit code."""
    found = _read(given.file)
    if given.json:
        sys.stdout.write(found.description.to_json() + "\n")
        return DONE
    titles, cells = found.description.table()
    print_table(f"{given.file.name}: {found.kind}", titles, cells)
    for heading, names in found.description.notes().items():
        sys.stdout.write(f"{heading}:\n" + "".join(f"  {name}: {text}\n" for name, text in names.items()))
    if found.islands is not None and found.islands.floats:
        print_table("computed in float", ("layer", "operation", "why"), found.islands.floats)
    sys.stdout.write("".join(f"{name}: {text}\n" for name, text in found.contents().facts.items()))
    return DONE


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument("file", type=Path, help=FILE)
    parser.add_argument("page", type=Path, nargs="?", help="the HTML page; by default FILE.html")


def report(given: argparse.Namespace) -> int:
    """Write the page about a file; returns the exit code."""
    from trainable_core.reporting.page import Page, require_page  # noqa: PLC0415 - no other command needs it

    place = require_page(given.file.with_name(f"{given.file.name}.html") if given.page is None else given.page)
    page = Page()
    sys.stdout.write(f"{page.write(_read(given.file, weights=True).contents(), place)}\n")
    return DONE


def _read(path: Path, *, weights: bool = False) -> FileContents:
    from trainable_core.reporting.files import read  # noqa: PLC0415 - no other command needs it

    return read(path, weights=weights)
