"""The documentation's tables of training methods are what ``trainable methods`` and ``trainable matrix`` print."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainable_core.cli import main
from trainable_core.conformance.matrix import NOBODY
from trainable_core.registry.methods import built_in_methods
from trainable_core.registry.process import list_backends

DOCUMENT = Path(__file__).parents[2] / "docs/plugins.md"
FACTS = 4  # columns that name no backend


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def documented(command: str) -> list[list[str]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return table(text.partition(f"<!-- trainable {command} --markdown -->")[2].partition("<!-- end -->")[0])


def only(row: list[str], backends: set[str]) -> list[str]:
    """Return a row with the backends that can be used here."""
    kept = [", ".join(name for name in cell.split(", ") if name in backends) or NOBODY for cell in row[FACTS:]]
    return [*row[:FACTS], *kept]


def test_the_documented_methods_are_those_that_are_declared(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert documented("methods") == table(capsys.readouterr().out)


def test_the_documents_table_is_what_the_command_prints():
    if not list_backends():
        pytest.skip("no backend is installed")
    # A process of its own, because the command imports every framework that it finds.
    command = [sys.executable, "-m", "trainable_core.cli", "matrix", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    built_in = set(built_in_methods())
    head, rule, *printed = table(done.stdout)
    printed = [row for row in printed if row[0] in built_in]  # a foreign plugin may be installed here
    known_head, known_rule, *known = documented("matrix")
    assert (head, rule) == (known_head, known_rule)
    backends = {name for row in printed for cell in row[FACTS:] for name in cell.split(", ")} - {NOBODY}
    assert backends
    reduced = [only(row, backends) for row in known]
    assert printed == [row for row in reduced if set(row[FACTS:]) != {NOBODY}]
