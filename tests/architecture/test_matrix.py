"""The documentation's tables of training methods are what ``trainable methods`` and ``trainable matrix`` print."""

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
    """Return a row with the backends that are installed here."""
    kept = [", ".join(name for name in cell.split(", ") if name in backends) or NOBODY for cell in row[FACTS:]]
    return [*row[:FACTS], *kept]


def test_the_documented_methods_are_those_that_are_declared(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert documented("methods") == table(capsys.readouterr().out)


def test_the_documents_table_is_what_the_command_prints(capsys):
    backends = {backend.name for backend in list_backends()}
    if not backends:
        pytest.skip("no backend is installed")
    assert main(["matrix", "--markdown"]) == 0
    built_in = set(built_in_methods())
    head, rule, *printed = table(capsys.readouterr().out)
    printed = [row for row in printed if row[0] in built_in]  # a foreign plugin may be installed here
    known_head, known_rule, *known = documented("matrix")
    assert (head, rule) == (known_head, known_rule)
    reduced = [only(row, backends) for row in known]
    assert printed == [row for row in reduced if set(row[FACTS:]) != {NOBODY}]
    assert printed
