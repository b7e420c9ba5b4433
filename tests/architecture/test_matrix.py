"""The table of who implements what is what ``trainable matrix --markdown`` prints."""

from pathlib import Path

import pytest

from trainable_core import TrainingMethod
from trainable_core.cli import main
from trainable_core.conformance.matrix import NOBODY
from trainable_core.registry.process import list_backends

DOCUMENT = Path(__file__).parents[2] / "docs/plugins.md"
FACTS = 3  # columns that name no backend


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def documented() -> list[list[str]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return table(text.partition("<!-- trainable matrix --markdown -->")[2].partition("<!-- end -->")[0])


def only(row: list[str], backends: set[str]) -> list[str]:
    """Return a row with the backends that are installed here."""
    kept = [", ".join(name for name in cell.split(", ") if name in backends) or NOBODY for cell in row[FACTS:]]
    return [*row[:FACTS], *kept]


def test_the_documents_table_is_what_the_command_prints(capsys):
    backends = {backend.name for backend in list_backends()}
    if not backends:
        pytest.skip("no backend is installed")
    assert main(["matrix", "--markdown"]) == 0
    built_in = {method.value for method in TrainingMethod}
    head, rule, *printed = table(capsys.readouterr().out)
    printed = [row for row in printed if row[0] in built_in]  # a foreign plugin may be installed here
    known_head, known_rule, *known = documented()
    assert (head, rule) == (known_head, known_rule)
    reduced = [only(row, backends) for row in known]
    assert printed == [row for row in reduced if set(row[FACTS:]) != {NOBODY}]
    assert printed
